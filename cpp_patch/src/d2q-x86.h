// What the x86 kernels share (d2q-x86.c, d2q-tiled.h): loads, the byte multiply-add, the codebooks with an offset.
#pragma once

#include "d2q-cpu.h"

#if defined(D2Q_X86)

#include <immintrin.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

// The tables with 64 added to every entry: the multiply-add wants one unsigned operand. The sums of the activations that
// Q8_K carries correct the offset. d2q_cpu_init makes them.
extern uint8_t d2q_pair_table_u7[256][32]; // [codebook][component*16 + code]
extern uint8_t d2q_scalar_table_u7[256][8];

#ifdef __cplusplus
}
#endif

static inline __m256i d2q_load(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

static inline __m256i d2q_load_both(const void * p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p));
}

// eight bytes, repeated: a scalar codebook, or the high bits of a block of 64
static inline __m256i d2q_load_8(const void * p) {
    int64_t v;
    memcpy(&v, p, 8);
    return _mm256_set1_epi64x(v);
}

// acc + u*s, u unsigned of 7 bits: two products are at most 2*127*128, so that int16 does not saturate
static inline __m256i d2q_dot_add(__m256i acc, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(acc, u, s);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

#endif
