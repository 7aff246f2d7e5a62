// Rows of a matrix interleaved by eight when a model is loaded, so that one column of activations is multiplied with eight
// rows at once: they share its loads, its scales and the correction of the tables' offset. Blocks keep their size, so that
// eight interleaved rows are as many bytes as they were, and the group of row r begins at r/8*8*(bytes of a row).
#pragma once

#include "d2q-blocks.h"
#include "d2q-cpu.h"

#include <assert.h>
#include <string.h>

#define D2Q_ROWS 8

#if defined(D2Q_X86) || defined(D2Q_GEMM)
#define D2Q_REPACK
#endif

// With VBMI, a look-up of 16 words takes its table from memory and ignores all but four bits of an index, so that nothing
// has to be masked. A word of qs then holds the codes of pair i in four groups, where a block has them in bytes i and
// i + 16. (Before VBMI, CPUs with AVX-512 need two shuffles for such a look-up.)
#if defined(__AVX512VBMI__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define D2Q_PAIR_WORDS 1
#else
#define D2Q_PAIR_WORDS 0
#endif

// [half of the block][row][...]: a half's four groups of one row lie together, and the eight rows one after the other. The
// fields are in the order in which they are read, which is what hardware prefetches.
typedef struct {
    ggml_half d[D2Q_ROWS];
    uint8_t   cb[2][D2Q_ROWS][4];
    uint8_t   qs[2][D2Q_ROWS][32];
} block_d2q2x8;

typedef struct {
    ggml_half d[D2Q_ROWS];
    uint8_t   cb[2][D2Q_ROWS][4];
    uint8_t   qh[D2Q_ROWS][32];
    uint8_t   qs[2][D2Q_ROWS][32];
} block_d2q3x8;

typedef struct {
    ggml_half d[D2Q_ROWS];
    uint8_t   cb[D2Q_ROWS][2];
    uint8_t   qs[D2Q_ROWS][16];
} block_d2q2_64x8;

typedef struct {
    ggml_half d[D2Q_ROWS];
    uint8_t   cb[D2Q_ROWS][2];
    uint8_t   qs[D2Q_ROWS][16];
    uint8_t   qh[D2Q_ROWS][8];
} block_d2q3_64x8;

static_assert(sizeof(block_d2q2x8)    == D2Q_ROWS*sizeof(block_d2q2),    "wrong size of block_d2q2x8");
static_assert(sizeof(block_d2q3x8)    == D2Q_ROWS*sizeof(block_d2q3),    "wrong size of block_d2q3x8");
static_assert(sizeof(block_d2q2_64x8) == D2Q_ROWS*sizeof(block_d2q2_64), "wrong size of block_d2q2_64x8");
static_assert(sizeof(block_d2q3_64x8) == D2Q_ROWS*sizeof(block_d2q3_64), "wrong size of block_d2q3_64x8");

// ---- one row's block of eight, as it was: multiplications of many columns unpack it like any other ----

static inline void d2q_row_halves(const uint8_t (*cb)[D2Q_ROWS][4], const uint8_t (*qs)[D2Q_ROWS][32], int r, bool words, uint8_t * out_cb, uint8_t * out_qs) {
    for (int u = 0; u < 2; u++) {
        memcpy(out_cb + 4*u, cb[u][r], 4);
        if (words) {
            for (int i = 0; i < 16; i++) {
                out_qs[32*u + i]      = qs[u][r][2*i];
                out_qs[32*u + i + 16] = qs[u][r][2*i + 1];
            }
        } else {
            memcpy(out_qs + 32*u, qs[u][r], 32);
        }
    }
}

static inline void d2q2_row(const block_d2q2x8 * x, int r, block_d2q2 * out) {
    out->d = x->d[r];
    d2q_row_halves(x->cb, x->qs, r, D2Q_PAIR_WORDS, out->cb, out->qs);
}

static inline void d2q3_row(const block_d2q3x8 * x, int r, block_d2q3 * out) {
    out->d = x->d[r];
    d2q_row_halves(x->cb, x->qs, r, false, out->cb, out->qs);
    memcpy(out->qh, x->qh[r], 32);
}

static inline void d2q2_64_row(const block_d2q2_64x8 * x, int r, block_d2q2_64 * out) {
    out->d = x->d[r];
    memcpy(out->cb, x->cb[r], 2);
    memcpy(out->qs, x->qs[r], 16);
}

static inline void d2q3_64_row(const block_d2q3_64x8 * x, int r, block_d2q3_64 * out) {
    out->d = x->d[r];
    memcpy(out->cb, x->cb[r], 2);
    memcpy(out->qs, x->qs[r], 16);
    memcpy(out->qh, x->qh[r], 8);
}

#ifdef __cplusplus
extern "C" {
#endif

// whether this target multiplies interleaved rows of such a matrix
bool d2q_can_repack(enum ggml_type type, int64_t n_rows);

// makes the tables of this file's kernels; once, before any of them runs
void d2q_repack_init(void);

// interleaves n_rows rows, a multiple of eight, of n weights each
void d2q_repack(enum ggml_type type, int64_t n, int64_t n_rows, const void * rows, void * out);

// result[r] = row r times column, for n_rows interleaved rows, a multiple of eight
void d2q_gemv(enum ggml_type type, int n, const void * rows, int64_t n_rows, const void * column, float * result);

// the kernels of d2q_gemv (d2q-repack-x86.c, d2q-repack-arm.c): one block after another of eight rows
#define D2Q_GEMV(name) void name(int blocks, const void * vx, const void * vy, float * result)

D2Q_GEMV(d2q2_gemv);
D2Q_GEMV(d2q3_gemv);
D2Q_GEMV(d2q2_64_gemv);
D2Q_GEMV(d2q3_64_gemv);

// the weights of such a tensor are interleaved: it lies in the buffer type of d2q-repack.cpp, which marks it
static inline bool d2q_is_repacked(const struct ggml_tensor * weights) {
    return weights->extra != NULL && d2q_is_own(weights->type);
}

#ifdef __cplusplus
}
#endif
