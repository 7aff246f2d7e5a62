// Eight interleaved rows of the d2q types times one column, for 64-bit ARM with dot product instructions. Four groups of
// half a block at a time, then all eight rows with them, so that their activations stay in registers.
#include "d2q-arm.h"
#include "d2q-repack.h"

#if defined(D2Q_ARM) && defined(D2Q_REPACK)

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

void d2q_repack_init(void) {} // the tables are those of d2q_cpu_init

static inline int8x16_t scalar_table(uint8_t cb) {
    const int8_t * table = d2q_scalar_table_arm[cb];
#if defined(__GNUC__)
    __asm__("" : "+r"(table)); // an address of one register: with an index, such a load is two operations on older cores
#endif
    return vld1q_s8(table);
}

// sum + 32 weights of one group times their activations
static inline int32x4_t dot_32(int32x4_t sum, int8x16_t w0, int8x16_t w1, const int8x16_t * y) {
    return vdotq_s32(vdotq_s32(sum, w0, y[0]), w1, y[1]);
}

// ---- the weights of one row times activations: four groups of half a block, or a block of 64 ----

// two groups of pairs, in the nibbles of 16 bytes
static inline void dot_pairs(const uint8_t * cb, const uint8_t * qs, const int8x16_t * y, int32x4_t * even, int32x4_t * odd) {
    const uint8x16_t q = vld1q_u8(qs), low = vandq_u8(q, vdupq_n_u8(15)), high = vshrq_n_u8(q, 4);
    const int8x16x2_t t0 = vld1q_s8_x2(d2q_pair_table[cb[0]][0]), t1 = vld1q_s8_x2(d2q_pair_table[cb[1]][0]);
    *even = dot_32(*even, vqtbl1q_s8(t0.val[0], low),  vqtbl1q_s8(t0.val[1], low),  y);
    *odd  = dot_32(*odd,  vqtbl1q_s8(t1.val[0], high), vqtbl1q_s8(t1.val[1], high), y + 2);
}

static inline int32x4_t d2q2_dot(int32x4_t sum, const block_d2q2x8 * x, int u, int r, const int8x16_t * y) {
    dot_pairs(x->cb[u][r],     x->qs[u][r],      y,     &sum, &sum);
    dot_pairs(x->cb[u][r] + 2, x->qs[u][r] + 16, y + 4, &sum, &sum);
    return sum;
}

static inline int32x4_t d2q3_dot(int32x4_t sum, const block_d2q3x8 * x, int u, int r, const int8x16_t * y) {
    const uint8_t * cb = x->cb[u][r];
    uint8x16x2_t run[2]; // the indices of groups 0 and 2, 1 and 3, in nibbles
    for (int h = 0; h < 2; h++) {
        const uint8x16_t q = vld1q_u8(x->qs[u][r] + 16*h);
        run[h] = d2q_indices(q, d2q_upper_bits(q, vshlq_u8(vld1q_u8(x->qh[r] + 16*h), vdupq_n_s8((int8_t) (1 - u)))));
    }
    const int8x16_t t0 = scalar_table(cb[0]), t1 = scalar_table(cb[1]), t2 = scalar_table(cb[2]), t3 = scalar_table(cb[3]);
    sum = dot_32(sum, vqtbl1q_s8(t0, d2q_nibble(run[0].val[0], 0)), vqtbl1q_s8(t0, d2q_nibble(run[1].val[0], 0)), y);
    sum = dot_32(sum, vqtbl1q_s8(t1, d2q_nibble(run[0].val[1], 0)), vqtbl1q_s8(t1, d2q_nibble(run[1].val[1], 0)), y + 2);
    sum = dot_32(sum, vqtbl1q_s8(t2, d2q_nibble(run[0].val[0], 1)), vqtbl1q_s8(t2, d2q_nibble(run[1].val[0], 1)), y + 4);
    sum = dot_32(sum, vqtbl1q_s8(t3, d2q_nibble(run[0].val[1], 1)), vqtbl1q_s8(t3, d2q_nibble(run[1].val[1], 1)), y + 6);
    return sum;
}

static inline void d2q2_64_dot(const block_d2q2_64x8 * x, int r, const int8x16_t * y, int32x4_t * p0, int32x4_t * p1) {
    dot_pairs(x->cb[r], x->qs[r], y, p0, p1);
}

static inline void d2q3_64_dot(const block_d2q3_64x8 * x, int r, const int8x16_t * y, int32x4_t * p0, int32x4_t * p1) {
    block_d2q3_64 row;
    d2q3_64_row(x, r, &row);
    const int8x16x4_t w = d2q3_64_weights(&row, 0);
    *p0 = dot_32(*p0, w.val[0], w.val[1], y);
    *p1 = dot_32(*p1, w.val[2], w.val[3], y + 2);
}

// ---- eight rows ----

// Compilers move the loads of all rows to the beginning, run out of registers, and store what they have loaded.
#if defined(__GNUC__)
#define D2Q_ROW_END() __asm__ volatile("" ::: "memory")
#else
#define D2Q_ROW_END()
#endif

// the sums of four rows' vectors, times their scales
static inline float32x4_t add_rows(float32x4_t acc, const int32x4_t * sum, float32x4_t scale) {
    return vfmaq_f32(acc, vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(sum[0], sum[1]), vpaddq_s32(sum[2], sum[3]))), scale);
}

static inline float32x4_t load_scales(const ggml_half * d, float activations) {
    return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) d))), activations);
}

#define D2Q_GEMV_Q8_K(type)                                                                                       \
    D2Q_GEMV(type##_gemv) {                                                                                           \
        const block_##type##x8 * GGML_RESTRICT x = vx;                                                            \
        const block_q8_K       * GGML_RESTRICT y = vy;                                                            \
        float32x4_t acc0 = vdupq_n_f32(0), acc1 = acc0;                                                           \
        for (int i = 0; i < blocks; i++) {                                                                        \
            int32x4_t sum[D2Q_ROWS];                                                                              \
            for (int r = 0; r < D2Q_ROWS; r++) { sum[r] = vdupq_n_s32(0); }                                       \
            for (int u = 0; u < 2; u++) {                                                                         \
                int8x16_t q8[8];                                                                                  \
                for (int k = 0; k < 8; k++) { q8[k] = vld1q_s8(y[i].qs + 128*u + 16*k); }                         \
                _Pragma("GCC unroll 8")                                                                           \
                for (int r = 0; r < D2Q_ROWS; r++) {                                                              \
                    sum[r] = type##_dot(sum[r], &x[i], u, r, q8);                                                 \
                    D2Q_ROW_END();                                                                                \
                }                                                                                                 \
            }                                                                                                     \
            acc0 = add_rows(acc0, sum,     load_scales(x[i].d,     y[i].d));                                      \
            acc1 = add_rows(acc1, sum + 4, load_scales(x[i].d + 4, y[i].d));                                      \
        }                                                                                                         \
        vst1q_f32(result, acc0);                                                                                  \
        vst1q_f32(result + 4, acc1);                                                                              \
    }

#define D2Q_GEMV_Q8_0(type)                                                                                       \
    D2Q_GEMV(type##_gemv) {                                                                                           \
        const block_##type##x8 * GGML_RESTRICT x = vx;                                                            \
        const block_q8_0       * GGML_RESTRICT y = vy;                                                            \
        float32x4_t acc[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};                                                    \
        for (int i = 0; i < blocks; i++, y += 2) {                                                                \
            const float d0 = GGML_CPU_FP16_TO_FP32(y[0].d), d1 = GGML_CPU_FP16_TO_FP32(y[1].d);                   \
            const int8x16_t q8[4] = {vld1q_s8(y[0].qs), vld1q_s8(y[0].qs + 16), vld1q_s8(y[1].qs), vld1q_s8(y[1].qs + 16)}; \
            _Pragma("GCC unroll 2")                                                                               \
            for (int h = 0; h < 2; h++) {                                                                         \
                int32x4_t p0[4], p1[4];                                                                           \
                _Pragma("GCC unroll 4")                                                                           \
                for (int r = 0; r < 4; r++) {                                                                     \
                    p0[r] = p1[r] = vdupq_n_s32(0);                                                               \
                    type##_dot(&x[i], 4*h + r, q8, &p0[r], &p1[r]);                                               \
                    D2Q_ROW_END();                                                                                \
                }                                                                                                 \
                acc[h] = add_rows(acc[h], p0, load_scales(x[i].d + 4*h, d0));                                     \
                acc[h] = add_rows(acc[h], p1, load_scales(x[i].d + 4*h, d1));                                     \
            }                                                                                                     \
        }                                                                                                         \
        vst1q_f32(result, acc[0]);                                                                                \
        vst1q_f32(result + 4, acc[1]);                                                                            \
    }

D2Q_GEMV_Q8_K(d2q2)
D2Q_GEMV_Q8_K(d2q3)
D2Q_GEMV_Q8_0(d2q2_64)
D2Q_GEMV_Q8_0(d2q3_64)

#endif
