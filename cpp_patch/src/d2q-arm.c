// Dot products of the d2q types for 64-bit ARM: NEON with the dot product instructions (armv8.2) or without (armv8.0).
#include "d2q-arm.h"

#if defined(D2Q_ARM)

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <assert.h>

D2Q_TABLE_ALIGN int8_t d2q_scalar_table_arm[256][16];

void d2q_cpu_init(void) {
    for (int b = 0; b < 256; b++) {
        for (int i = 0; i < 16; i++) { d2q_scalar_table_arm[b][i] = d2q_scalar_table[b][d2q_canonical_index(i)]; }
    }
}

// sum + the products of a and b, in lanes that only their total gives a meaning
static inline int32x4_t d2q_dot_add(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    // two products are at most 2*64*128, so that int16 does not overflow
    const int16x8_t products = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(sum, vmlal_s8(products, vget_high_s8(a), vget_high_s8(b)));
#endif
}

#define D2Q_ARM_DOT_Q8_K(type)                                                                            \
    D2Q_VEC_DOT(ggml_vec_dot_##type##_q8_K) {                                                             \
        assert(n % QK_K == 0 && nrc == 1);                                                                \
        GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);                              \
        const block_##type * GGML_RESTRICT x = vx;                                                        \
        const block_q8_K   * GGML_RESTRICT y = vy;                                                        \
        float32x4_t acc = vdupq_n_f32(0);                                                                 \
        for (int i = 0; i < n/QK_K; i++) {                                                                \
            int32x4_t even = vdupq_n_s32(0), odd = even;                                                  \
            D2Q_ARM_STEP(type, 0)                                                                         \
            D2Q_ARM_STEP(type, 1)                                                                         \
            D2Q_ARM_STEP(type, 2)                                                                         \
            D2Q_ARM_STEP(type, 3)                                                                         \
            acc = vfmaq_n_f32(acc, vcvtq_f32_s32(vaddq_s32(even, odd)), GGML_CPU_FP16_TO_FP32(x[i].d)*y[i].d); \
        }                                                                                                 \
        *s = vaddvq_f32(acc);                                                                             \
    }

#define D2Q_ARM_STEP(type, t)                                                     \
    {                                                                             \
        const int8x16x4_t w = type##_weights(&x[i], t);                           \
        even = d2q_dot_add(even, w.val[0], vld1q_s8(y[i].qs + 64*(t)));           \
        odd  = d2q_dot_add(odd,  w.val[1], vld1q_s8(y[i].qs + 64*(t) + 16));      \
        even = d2q_dot_add(even, w.val[2], vld1q_s8(y[i].qs + 64*(t) + 32));      \
        odd  = d2q_dot_add(odd,  w.val[3], vld1q_s8(y[i].qs + 64*(t) + 48));      \
    }

#define D2Q_ARM_DOT_Q8_0(type)                                                                            \
    D2Q_VEC_DOT(ggml_vec_dot_##type##_q8_0) {                                                             \
        assert(n % QK_D2Q_64 == 0 && nrc == 1);                                                           \
        GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);                              \
        const block_##type * GGML_RESTRICT x = vx;                                                        \
        const block_q8_0   * GGML_RESTRICT y = vy;                                                        \
        float32x4_t acc0 = vdupq_n_f32(0), acc1 = acc0;                                                   \
        for (int i = 0; i < n/QK_D2Q_64; i++, y += 2) {                                                   \
            const float d = GGML_CPU_FP16_TO_FP32(x[i].d);                                                \
            const int8x16x4_t w = type##_weights(&x[i], 0);                                               \
            int32x4_t p0 = d2q_dot_add(vdupq_n_s32(0), w.val[0], vld1q_s8(y[0].qs));                      \
            int32x4_t p1 = d2q_dot_add(vdupq_n_s32(0), w.val[2], vld1q_s8(y[1].qs));                      \
            p0 = d2q_dot_add(p0, w.val[1], vld1q_s8(y[0].qs + 16));                                       \
            p1 = d2q_dot_add(p1, w.val[3], vld1q_s8(y[1].qs + 16));                                       \
            acc0 = vfmaq_n_f32(acc0, vcvtq_f32_s32(p0), d*GGML_CPU_FP16_TO_FP32(y[0].d));                 \
            acc1 = vfmaq_n_f32(acc1, vcvtq_f32_s32(p1), d*GGML_CPU_FP16_TO_FP32(y[1].d));                 \
        }                                                                                                 \
        *s = vaddvq_f32(vaddq_f32(acc0, acc1));                                                           \
    }

D2Q_ARM_DOT_Q8_K(d2q2)
D2Q_ARM_DOT_Q8_K(d2q3)
D2Q_ARM_DOT_Q8_0(d2q2_64)
D2Q_ARM_DOT_Q8_0(d2q3_64)

#endif
