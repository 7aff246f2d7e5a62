// Matrix multiplication of the d2q types for 64-bit ARM with dot product or matrix multiply instructions: prompts.
// The weights of 8 rows are looked up once for up to 64 columns of activations and laid out so that one instruction
// multiplies four rows with one column (dotprod) or two rows with two columns (i8mm), as integers per block.
#include "d2q-arm.h"
#include "d2q-repack.h"

#if defined(D2Q_GEMM)

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <assert.h>
#include <stdbool.h>

enum { TILE_ROWS = 8, GROUP_COLUMNS = 4, PANEL = D2Q_GEMM_PANEL, GROUPS = PANEL/GROUP_COLUMNS };

// one block of each of eight rows. Per 16 weights, first rows 0..3, then rows 4..7, 64 bytes each
typedef struct {
    int8_t w[TILE_ROWS*QK_K];
    float  d[TILE_ROWS];
} tile_t;

// 16 weights of four rows. dotprod: 4 weights of each row, the next 4 of each, ...; i8mm: 8 weights of rows 0 and 1, the
// next 8 of them, the same of rows 2 and 3
static inline void store_rows(int8_t * out, int8x16_t r0, int8x16_t r1, int8x16_t r2, int8x16_t r3) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    const int64x2_t a = vreinterpretq_s64_s8(r0), b = vreinterpretq_s64_s8(r1), c = vreinterpretq_s64_s8(r2), d = vreinterpretq_s64_s8(r3);
    const int64x2_t v0 = vtrn1q_s64(a, b), v1 = vtrn2q_s64(a, b), v2 = vtrn1q_s64(c, d), v3 = vtrn2q_s64(c, d);
#else
    const int32x4_t a = vreinterpretq_s32_s8(r0), b = vreinterpretq_s32_s8(r1), c = vreinterpretq_s32_s8(r2), d = vreinterpretq_s32_s8(r3);
    const int64x2_t ab0 = vreinterpretq_s64_s32(vtrn1q_s32(a, b)), ab1 = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    const int64x2_t cd0 = vreinterpretq_s64_s32(vtrn1q_s32(c, d)), cd1 = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    const int64x2_t v0 = vtrn1q_s64(ab0, cd0), v1 = vtrn1q_s64(ab1, cd1), v2 = vtrn2q_s64(ab0, cd0), v3 = vtrn2q_s64(ab1, cd1);
#endif
    vst1q_s8(out,      vreinterpretq_s8_s64(v0));
    vst1q_s8(out + 16, vreinterpretq_s8_s64(v1));
    vst1q_s8(out + 32, vreinterpretq_s8_s64(v2));
    vst1q_s8(out + 48, vreinterpretq_s8_s64(v3));
}

#define UNPACK_64(type, t)                                                                                                       \
    for (int h = 0; h < 2; h++) {                                                                                                \
        const int8x16x4_t w0 = type##_weights(x[4*h],     t), w1 = type##_weights(x[4*h + 1], t);                                \
        const int8x16x4_t w2 = type##_weights(x[4*h + 2], t), w3 = type##_weights(x[4*h + 3], t);                                \
        for (int v = 0; v < 4; v++) {                                                                                            \
            store_rows(tile->w + 512*(t) + 128*v + 64*h, w0.val[v], w1.val[v], w2.val[v], w3.val[v]);                            \
        }                                                                                                                        \
    }

// the same for half a block of d2q3, whose four groups share their indices
#define UNPACK_D2Q3(half)                                                                                                        \
    for (int h = 0; h < 2; h++) {                                                                                                \
        uint8x16x2_t indices[2][4];                                                                                              \
        for (int r = 0; r < 8; r++) { indices[r/4][r%4] = d2q3_indices(x[4*h + r%4], half, r/4); }                               \
        _Pragma("GCC unroll 8")                                                                                                  \
        for (int v = 0; v < 8; v++) {                                                                                            \
            const int s = v/2, run = v%2;                                                                                        \
            int8x16_t w[4];                                                                                                      \
            for (int r = 0; r < 4; r++) {                                                                                        \
                w[r] = d2q_scalar_entries(x[4*h + r]->cb + 4*(half) + s, d2q_nibble(indices[run][r].val[s%2], s/2));             \
            }                                                                                                                    \
            store_rows(tile->w + 1024*(half) + 128*v + 64*h, w[0], w[1], w[2], w[3]);                                            \
        }                                                                                                                        \
    }

// block i of rows first .. first + 7; beyond the last row the last one again, whose results nobody reads. Of interleaved
// rows there are always eight: they become blocks as the file has them.
#define UNPACK(type, ...)                                                                                                        \
    static void type##_tile(const block_##type * const * x, tile_t * tile) {                                                     \
        for (int r = 0; r < TILE_ROWS; r++) { tile->d[r] = GGML_CPU_FP16_TO_FP32(x[r]->d); }                                     \
        __VA_ARGS__                                                                                                              \
    }                                                                                                                            \
    static void type##_unpack(const char * rows, size_t stride, int first, int last, int i, tile_t * tile) {                     \
        const block_##type * x[TILE_ROWS];                                                                                       \
        for (int r = 0; r < TILE_ROWS; r++) {                                                                                    \
            x[r] = (const block_##type *) (rows + (size_t) MIN(first + r, last)*stride) + i;                                     \
        }                                                                                                                        \
        type##_tile(x, tile);                                                                                                    \
    }                                                                                                                            \
    static void type##_unpack_x8(const char * rows, size_t stride, int first, int last, int i, tile_t * tile) {                  \
        GGML_UNUSED(last);                                                                                                       \
        block_##type own[TILE_ROWS];                                                                                             \
        const block_##type * x[TILE_ROWS];                                                                                       \
        for (int r = 0; r < TILE_ROWS; r++) {                                                                                    \
            type##_row((const block_##type##x8 *) (rows + (size_t) first*stride) + i, r, &own[r]);                               \
            x[r] = &own[r];                                                                                                      \
        }                                                                                                                        \
        type##_tile(x, tile);                                                                                                    \
    }

UNPACK(d2q2,    UNPACK_64(d2q2, 0) UNPACK_64(d2q2, 1) UNPACK_64(d2q2, 2) UNPACK_64(d2q2, 3))
UNPACK(d2q3,    UNPACK_D2Q3(0) UNPACK_D2Q3(1))
UNPACK(d2q2_64, UNPACK_64(d2q2_64, 0))
UNPACK(d2q3_64, UNPACK_64(d2q3_64, 0))

// The activations of one block of weights in all columns: one part of 256 (Q8_K) or two of 32 (Q8_0), each with a scale.
typedef struct {
    float d[2][PANEL];
#if defined(__ARM_FEATURE_MATMUL_INT8)
    int8_t q[GROUPS][GROUP_COLUMNS*QK_K]; // per 16 values: 8 of columns 0 and 1, the next 8 of them, the same of 2 and 3
#else
    const int8_t * q[2][PANEL];
#endif
} panel_t;

static void gather_columns(panel_t * panel, const void * const * columns, int n_columns, int i, bool q8_K) {
    const int parts = q8_K ? 1 : 2, n16 = q8_K ? 16 : 2;
    for (int g = 0; g*GROUP_COLUMNS < n_columns; g++) {
        for (int p = 0; p < parts; p++) {
            const int8_t * q[GROUP_COLUMNS];
            for (int c = 0; c < GROUP_COLUMNS; c++) {
                // beyond the last column the last one again, whose results nobody reads
                const void * column = columns[MIN(g*GROUP_COLUMNS + c, n_columns - 1)];
                float * d = &panel->d[p][g*GROUP_COLUMNS + c];
                if (q8_K) {
                    const block_q8_K * y = (const block_q8_K *) column + i;
                    q[c] = y->qs;
                    *d   = y->d;
                } else {
                    const block_q8_0 * y = (const block_q8_0 *) column + 2*i + p;
                    q[c] = y->qs;
                    *d   = GGML_CPU_FP16_TO_FP32(y->d);
                }
#if !defined(__ARM_FEATURE_MATMUL_INT8)
                panel->q[p][g*GROUP_COLUMNS + c] = q[c];
#endif
            }
#if defined(__ARM_FEATURE_MATMUL_INT8)
            for (int k = 0; k < n16; k++) {
                store_rows(panel->q[g] + 64*(p*n16 + k), vld1q_s8(q[0] + 16*k), vld1q_s8(q[1] + 16*k), vld1q_s8(q[2] + 16*k), vld1q_s8(q[3] + 16*k));
            }
#else
            GGML_UNUSED(n16);
#endif
        }
    }
}

// sum[c][h]: rows 4*h..4*h + 3 of the tile times column c of group g, over the n16*16 values of part p
static inline void part_sums(const tile_t * tile, const panel_t * panel, int g, int p, int n16, int32x4_t sum[GROUP_COLUMNS][2]) {
    const int8_t * w = tile->w + p*n16*128;
#if defined(__ARM_FEATURE_MATMUL_INT8)
    const int8_t * q = panel->q[g] + p*n16*64;
    int32x4_t square[4][2]; // [pair of rows][pair of columns]: row 0 with both columns, row 1 with both
    for (int r = 0; r < 4; r++) { square[r][0] = square[r][1] = vdupq_n_s32(0); }
    for (int k = 0; k < n16; k++) {
        for (int half = 0; half < 2; half++) {
            const int8x16_t y0 = vld1q_s8(q + 64*k + 16*half), y1 = vld1q_s8(q + 64*k + 32 + 16*half);
            for (int r = 0; r < 4; r++) {
                const int8x16_t x = vld1q_s8(w + 128*k + 32*r + 16*half);
                square[r][0] = vmmlaq_s32(square[r][0], x, y0);
                square[r][1] = vmmlaq_s32(square[r][1], x, y1);
            }
        }
    }
    for (int c = 0; c < 2; c++) {
        for (int h = 0; h < 2; h++) {
            sum[2*c][h]     = vuzp1q_s32(square[2*h][c], square[2*h + 1][c]);
            sum[2*c + 1][h] = vuzp2q_s32(square[2*h][c], square[2*h + 1][c]);
        }
    }
#else
    const int8_t * const * q = &panel->q[p][g*GROUP_COLUMNS];
    for (int c = 0; c < GROUP_COLUMNS; c++) { sum[c][0] = sum[c][1] = vdupq_n_s32(0); }
    for (int k = 0; k < n16; k++) {
        int8x16_t y[GROUP_COLUMNS];
        for (int c = 0; c < GROUP_COLUMNS; c++) { y[c] = vld1q_s8(q[c] + 16*k); }
        for (int h = 0; h < 2; h++) {
            const int8_t * x = w + 128*k + 64*h;
            const int8x16_t x0 = vld1q_s8(x), x1 = vld1q_s8(x + 16), x2 = vld1q_s8(x + 32), x3 = vld1q_s8(x + 48);
            for (int c = 0; c < GROUP_COLUMNS; c++) {
                sum[c][h] = vdotq_laneq_s32(sum[c][h], x0, y[c], 0);
                sum[c][h] = vdotq_laneq_s32(sum[c][h], x1, y[c], 1);
                sum[c][h] = vdotq_laneq_s32(sum[c][h], x2, y[c], 2);
                sum[c][h] = vdotq_laneq_s32(sum[c][h], x3, y[c], 3);
            }
        }
    }
#endif
}

// adds one block's products to the results; out: the tile's first row and the group's first column, a column each PANEL
static inline void multiply_tile(const tile_t * tile, const panel_t * panel, int g, int parts, int n16, float * out) {
    const float32x4_t d[2] = {vld1q_f32(tile->d), vld1q_f32(tile->d + 4)};
    for (int p = 0; p < parts; p++) {
        int32x4_t sum[GROUP_COLUMNS][2];
        part_sums(tile, panel, g, p, n16, sum);
        for (int c = 0; c < GROUP_COLUMNS; c++) {
            for (int h = 0; h < 2; h++) {
                float * to = out + c*PANEL + 4*h;
                const float32x4_t scale = vmulq_n_f32(d[h], panel->d[p][g*GROUP_COLUMNS + c]);
                vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sum[c][h]), scale));
            }
        }
    }
}

typedef void (*unpack_t)(const char * rows, size_t stride, int first, int last, int i, tile_t * tile);

static void multiply_panel(unpack_t unpack, bool q8_K, int n_blocks, const char * rows, size_t stride, int n_rows,
                           const void * const * columns, float * const * results, int n_columns) {
    float out[PANEL][PANEL];
    tile_t  tile;
    panel_t panel;
    const int n_groups = (n_columns + GROUP_COLUMNS - 1)/GROUP_COLUMNS;
    memset(out, 0, sizeof(out[0])*(size_t) (n_groups*GROUP_COLUMNS));
    for (int i = 0; i < n_blocks; i++) {
        gather_columns(&panel, columns, n_columns, i, q8_K);
        for (int r = 0; r < n_rows; r += TILE_ROWS) {
            unpack(rows, stride, r, n_rows - 1, i, &tile);
            for (int g = 0; g < n_groups; g++) {
                if (q8_K) {
                    multiply_tile(&tile, &panel, g, 1, 16, out[g*GROUP_COLUMNS] + r);
                } else {
                    multiply_tile(&tile, &panel, g, 2, 2, out[g*GROUP_COLUMNS] + r);
                }
            }
        }
    }
    for (int c = 0; c < n_columns; c++) {
        memcpy(results[c], out[c], sizeof(float)*(size_t) n_rows);
    }
}

void d2q_gemm(enum ggml_type type, int n, const void * rows, size_t stride, bool repacked, int64_t n_rows, const void * const * columns, float * const * results, int n_columns) {
    static const unpack_t unpacks[4][2] = {
        {d2q2_unpack, d2q2_unpack_x8}, {d2q3_unpack, d2q3_unpack_x8}, {d2q2_64_unpack, d2q2_64_unpack_x8}, {d2q3_64_unpack, d2q3_64_unpack_x8},
    };
    const unpack_t unpack = unpacks[type == GGML_TYPE_D2Q2 ? 0 : type == GGML_TYPE_D2Q3 ? 1 : type == GGML_TYPE_D2Q2_64 ? 2 : 3][repacked];
    const bool q8_K = type == GGML_TYPE_D2Q2 || type == GGML_TYPE_D2Q3;
    const int block = q8_K ? QK_K : QK_D2Q_64;
    assert(n % block == 0 && n_columns <= PANEL);
    for (int64_t r = 0; r < n_rows; r += PANEL) {
        float * to[PANEL];
        for (int c = 0; c < n_columns; c++) {
            to[c] = results[c] + r;
        }
        multiply_panel(unpack, q8_K, n/block, (const char *) rows + (size_t) r*stride, stride, (int) MIN(n_rows - r, PANEL), columns, to, n_columns);
    }
}

#endif
