// Activations to Q8_K, for x86 and ARM. Stock llama.cpp does it one number at a time there: up to an eighth of a prompt's
// matrix multiplications with 2048 rows. The result is quantize_row_q8_K_ref's, bit for bit, for finite numbers.
#include "d2q-cpu.h"

#if defined(D2Q_X86) || defined(D2Q_ARM)

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#if defined(D2Q_X86)

#include "d2q-x86.h"

static inline float d2q_largest(__m256 v) {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}

// the largest and the smallest of 256 numbers and zero
static inline void d2q_range(const float * x, float * largest, float * smallest) {
    __m256 high = _mm256_setzero_ps(), low = high;
    for (int j = 0; j < QK_K; j += 8) {
        const __m256 v = _mm256_loadu_ps(x + j);
        high = _mm256_max_ps(v, high); // this order skips what is not a number
        low  = _mm256_min_ps(v, low);
    }
    *largest  = d2q_largest(high);
    *smallest = -d2q_largest(_mm256_sub_ps(_mm256_setzero_ps(), low));
}

// eight times 32 numbers of 8 bits: the sums of 16 neighbours
static inline __m256i d2q_sums_of_16(const __m256i * q) {
    __m256i s[8]; // sums of four; each lane belongs to one sum of 16
    for (int i = 0; i < 8; i++) { s[i] = d2q_dot_add(_mm256_setzero_si256(), _mm256_set1_epi8(1), q[i]); }
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(s[4], s[5]), _mm256_hadd_epi32(s[6], s[7]));
    const __m256i sums = _mm256_packs_epi32(a, b); // even ones in the low lane, odd ones in the high lane
    const __m128i even = _mm256_castsi256_si128(sums), odd = _mm256_extracti128_si256(sums, 1);
    return _mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd));
}

static inline __m256i d2q_rounded(const float * x, __m256 scale) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), scale));
}

// codes and sums of 256 numbers
static inline void d2q_codes(const float * x, float scale, block_q8_K * y) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing works within lanes
    const __m256  s = _mm256_set1_ps(scale);
    __m256i q[8];
    for (int j = 0; j < 8; j++, x += 32) {
        const __m256i a = _mm256_packs_epi32(d2q_rounded(x,      s), d2q_rounded(x + 8,  s));
        const __m256i b = _mm256_packs_epi32(d2q_rounded(x + 16, s), d2q_rounded(x + 24, s));
        q[j] = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
        _mm256_storeu_si256((__m256i *) (y->qs + 32*j), q[j]);
    }
    _mm256_storeu_si256((__m256i *) y->bsums, d2q_sums_of_16(q));
}

#else

#include <arm_neon.h>

static inline void d2q_range(const float * x, float * largest, float * smallest) {
    float32x4_t high = vdupq_n_f32(0), low = high;
    for (int j = 0; j < QK_K; j += 4) {
        const float32x4_t v = vld1q_f32(x + j);
        high = vmaxnmq_f32(high, v);
        low  = vminnmq_f32(low, v);
    }
    *largest  = vmaxvq_f32(high);
    *smallest = vminvq_f32(low);
}

static inline int16x4_t d2q_rounded(const float * x, float scale) {
    return vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), scale)));
}

static inline void d2q_codes(const float * x, float scale, block_q8_K * y) {
    for (int j = 0; j < QK_K; j += 16, x += 16) {
        const int16x8_t a = vcombine_s16(d2q_rounded(x,     scale), d2q_rounded(x + 4,  scale));
        const int16x8_t b = vcombine_s16(d2q_rounded(x + 8, scale), d2q_rounded(x + 12, scale));
        const int8x16_t q = vcombine_s8(vqmovn_s16(a), vqmovn_s16(b));
        vst1q_s8(y->qs + j, q);
        y->bsums[j/16] = vaddlvq_s8(q);
    }
}

#endif

// the number of largest magnitude, of two opposite ones the first
static inline float d2q_extreme(const float * x) {
    float largest, smallest;
    d2q_range(x, &largest, &smallest);
    if (largest != -smallest || largest == 0) {
        return largest > -smallest ? largest : smallest;
    }
    int j = 0;
    while (fabsf(x[j]) != largest) { j++; }
    return x[j];
}

void d2q_quantize_row_q8_K(const float * GGML_RESTRICT x, void * GGML_RESTRICT vy, int64_t k) {
    assert(k % QK_K == 0);
    block_q8_K * GGML_RESTRICT y = vy;
    for (int64_t i = 0; i < k/QK_K; i++, x += QK_K) {
        const float extreme = d2q_extreme(x);
        if (extreme == 0) {
            memset(&y[i], 0, sizeof(y[i]));
            continue;
        }
        const float scale = -127.0f/extreme;
        d2q_codes(x, scale, &y[i]);
        y[i].d = 1/scale;
    }
}

#endif
