// The d2q types in the CPU backend: dot products with 8-bit activations, Q8_K for blocks of 256, Q8_0 for blocks of 64.
// The functions without suffix are the fastest for the compiler's target; the _generic ones are their reference.
#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// which file of kernels the target gets
#if defined(__AVX2__)
#define D2Q_X86
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define D2Q_ARM
#if defined(__ARM_FEATURE_DOTPROD)
#define D2Q_GEMM // x86 has tiled.cpp, where our blocks take part
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

static inline bool d2q_is_own(enum ggml_type type) {
    return type == GGML_TYPE_D2Q2 || type == GGML_TYPE_D2Q3 || type == GGML_TYPE_D2Q2_64 || type == GGML_TYPE_D2Q3_64;
}

void quantize_row_d2q2   (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_d2q3   (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_d2q2_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_d2q3_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

#define D2Q_VEC_DOT(name) \
    void name(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc)

// activations of d2q2, d2q3 and the K types; x86 and ARM have a faster one than ggml's
void d2q_quantize_row_q8_K(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

D2Q_VEC_DOT(ggml_vec_dot_d2q2_q8_K);
D2Q_VEC_DOT(ggml_vec_dot_d2q3_q8_K);
D2Q_VEC_DOT(ggml_vec_dot_d2q2_64_q8_0);
D2Q_VEC_DOT(ggml_vec_dot_d2q3_64_q8_0);

D2Q_VEC_DOT(ggml_vec_dot_d2q2_q8_K_generic);
D2Q_VEC_DOT(ggml_vec_dot_d2q3_q8_K_generic);
D2Q_VEC_DOT(ggml_vec_dot_d2q2_64_q8_0_generic);
D2Q_VEC_DOT(ggml_vec_dot_d2q3_64_q8_0_generic);

// From D2Q_GEMM_MIN_COLUMNS columns of activations on, a matrix multiplication is faster than a dot product for each result.
// It looks up the weights of a row once for D2Q_GEMM_PANEL columns, so that a thread's share should be as large as that.
#define D2Q_GEMM_PANEL       64
#define D2Q_GEMM_MIN_COLUMNS 4

// whether this target has such a multiplication for the type
bool d2q_has_gemm(enum ggml_type type);

// Rows and columns of the shares that threads take of a multiplication; `stock` is what ggml takes. For one column those
// are 64 rows, 38 KB of d2q2 in 2048 columns: the next share is elsewhere, and two threads lose a sixth of their time at the
// beginnings. Four shares for each thread are what repack.cpp makes, too.
int d2q_chunk_size(enum ggml_type type, int64_t n_rows, int64_t n_columns, int n_threads, int stock);

// results[c][r] = row r times column c; n weights in a row, `stride` bytes from one row to the next, at most
// D2Q_GEMM_PANEL columns. Rows may be interleaved (d2q-repack.h). Only where the target has it.
void d2q_gemm(enum ggml_type type, int n, const void * rows, size_t stride, bool repacked, int64_t n_rows, const void * const * columns, float * const * results, int n_columns);

// One thread's share of GGML_OP_MUL_MAT, results ir0_start..ir0_end - 1 of columns ir1_start..ir1_end - 1 (counted through
// all matrices); wdata: the activations in the type of the dot product. False: not done here.
bool d2q_mul_mat_chunk(const struct ggml_tensor * dst, const void * wdata, int64_t ir0_start, int64_t ir0_end, int64_t ir1_start, int64_t ir1_end);

// The same for GGML_OP_MUL_MAT_ID and one expert's matrix; mapping: for each of its columns the slot and the row of src1.
bool d2q_mul_mat_id_chunk(const struct ggml_tensor * dst, const void * matrix, const int32_t (*mapping)[2], const void * wdata,
                          int64_t ir0_start, int64_t ir0_end, int64_t ir1_start, int64_t ir1_end);

// makes the tables that the kernels of this target need; ggml_cpu_init calls it once, before any dot product
void d2q_cpu_init(void);

#ifdef __cplusplus
}
#endif
