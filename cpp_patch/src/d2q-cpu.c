// The portable dot products of the d2q types, which are also the reference of the others, and the CPU backend's quantizers.
#include "d2q-cpu.h"
#include "d2q-blocks.h"
#include "d2q-quants.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu/quants.h"
#include "simd-mappings.h"

#include <assert.h>

void quantize_row_d2q2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_d2q2_ref(x, y, k);
}

void quantize_row_d2q3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_d2q3_ref(x, y, k);
}

void quantize_row_d2q2_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_d2q2_64_ref(x, y, k);
}

void quantize_row_d2q3_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_d2q3_64_ref(x, y, k);
}

// ---- generic ----

static inline int32_t d2q_dot_group(const int8_t * entries, const int8_t * q8) {
    int32_t sum = 0;
    for (int j = 0; j < D2Q_GROUP; j++) {
        sum += entries[j]*q8[j];
    }
    return sum;
}

#define D2Q_DOT_Q8_K(type)                                                             \
    D2Q_VEC_DOT(ggml_vec_dot_##type##_q8_K_generic) {                                  \
        assert(n % QK_K == 0 && nrc == 1);                                             \
        GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);           \
        const block_##type * GGML_RESTRICT x = vx;                                     \
        const block_q8_K   * GGML_RESTRICT y = vy;                                     \
        float sum = 0;                                                                 \
        for (int i = 0; i < n/QK_K; i++) {                                             \
            int32_t isum = 0;                                                          \
            for (int k = 0; k < 8; k++) {                                              \
                int8_t entries[D2Q_GROUP];                                             \
                type##_group(&x[i], k, entries);                                       \
                isum += d2q_dot_group(entries, y[i].qs + D2Q_GROUP*k);                 \
            }                                                                          \
            sum += GGML_CPU_FP16_TO_FP32(x[i].d)*y[i].d*(float) isum;                  \
        }                                                                              \
        *s = sum;                                                                      \
    }

#define D2Q_DOT_Q8_0(type)                                                             \
    D2Q_VEC_DOT(ggml_vec_dot_##type##_q8_0_generic) {                                  \
        assert(n % QK_D2Q_64 == 0 && nrc == 1);                                        \
        GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);           \
        const block_##type * GGML_RESTRICT x = vx;                                     \
        const block_q8_0   * GGML_RESTRICT y = vy;                                     \
        float sum = 0;                                                                 \
        for (int i = 0; i < n/QK_D2Q_64; i++) {                                        \
            float block = 0;                                                           \
            for (int k = 0; k < 2; k++) {                                              \
                int8_t entries[D2Q_GROUP];                                             \
                type##_group(&x[i], k, entries);                                       \
                block += GGML_CPU_FP16_TO_FP32(y[2*i + k].d)*(float) d2q_dot_group(entries, y[2*i + k].qs); \
            }                                                                          \
            sum += GGML_CPU_FP16_TO_FP32(x[i].d)*block;                                \
        }                                                                              \
        *s = sum;                                                                      \
    }

D2Q_DOT_Q8_K(d2q2)
D2Q_DOT_Q8_K(d2q3)
D2Q_DOT_Q8_0(d2q2_64)
D2Q_DOT_Q8_0(d2q3_64)

// ---- targets without kernels of their own ----

#if !defined(D2Q_X86) && !defined(D2Q_ARM)

void d2q_cpu_init(void) {}

void d2q_quantize_row_q8_K(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_q8_K(x, y, k);
}

D2Q_VEC_DOT(ggml_vec_dot_d2q2_q8_K)    { ggml_vec_dot_d2q2_q8_K_generic   (n, s, bs, vx, bx, vy, by, nrc); }
D2Q_VEC_DOT(ggml_vec_dot_d2q3_q8_K)    { ggml_vec_dot_d2q3_q8_K_generic   (n, s, bs, vx, bx, vy, by, nrc); }
D2Q_VEC_DOT(ggml_vec_dot_d2q2_64_q8_0) { ggml_vec_dot_d2q2_64_q8_0_generic(n, s, bs, vx, bx, vy, by, nrc); }
D2Q_VEC_DOT(ggml_vec_dot_d2q3_64_q8_0) { ggml_vec_dot_d2q3_64_q8_0_generic(n, s, bs, vx, bx, vy, by, nrc); }

#endif
