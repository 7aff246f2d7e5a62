// What the x86 kernels share (d2q-x86.c, d2q-repack-x86.c, d2q-tiled.h): loads, indices, the byte multiply-add, the
// codebooks with an offset.
#pragma once

#include "d2q-cpu.h"

#if defined(D2Q_X86)

#include <immintrin.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

// The tables with 64 added to every entry: the multiply-add wants one unsigned operand. The sums of the activations that
// Q8_K carries correct the offset. The order of scalars is that of d2q_canonical_index. d2q_cpu_init makes them.
extern uint8_t d2q_pair_table_u7[256][32]; // [codebook][component*16 + code]
extern uint8_t d2q_scalar_table_u7[256][16];
extern int8_t  d2q_scalar_table_s8[256][16]; // without the offset

#ifdef __cplusplus
}
#endif

static inline __m256i d2q_load(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

static inline __m256i d2q_load_both(const void * p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p));
}

// eight bytes, repeated: the high bits of a block of 64
static inline __m256i d2q_load_8(const void * p) {
    int64_t v;
    memcpy(&v, p, 8);
    return _mm256_set1_epi64x(v);
}

#if defined(__AVX512VL__)
// bits of a where the mask has ones, bits of b elsewhere; a should be what nothing else needs, as the instruction overwrites it
static inline __m256i d2q_merge(__m256i a, __m256i b, int mask) {
    return _mm256_ternarylogic_epi32(a, b, _mm256_set1_epi8((char) mask), 0xE4);
}
#endif

// the entries that the low nibbles of `index` select from 16, the same 16 in both lanes; the high nibbles may be anything
static inline __m256i d2q_lookup(__m256i table, __m256i index) {
#if defined(__AVX512VBMI__) && defined(__AVX512VL__)
    return _mm256_permutexvar_epi8(index, table); // looks at five bits; the fifth selects a lane
#else
    return _mm256_shuffle_epi8(table, _mm256_and_si256(index, _mm256_set1_epi8(15)));
#endif
}

// The indices of the four groups of half a d2q3, whose low bits are in qs and whose high bits are the odd ones of `high`: two
// of them in the nibbles of each register, those of the first and the third group in *even, of the second and the fourth
// in *odd.
static inline void d2q3_indices(const uint8_t * qs, __m256i high, __m256i * even, __m256i * odd) {
    // a lane is a chain: the code before is in the byte before, but for its first byte
    const __m256i first = _mm256_set_epi64x(0x5555555555555555, 0x5555555555555500, 0x5555555555555555, 0x5555555555555500);
    const __m256i before = _mm256_and_si256(first, d2q_load(qs - 1));
    const __m256i upper  = _mm256_or_si256(before, _mm256_and_si256(_mm256_set1_epi8((char) 0xAA), high)), q = d2q_load(qs);
#if defined(__AVX512VL__)
    *even = d2q_merge(_mm256_slli_epi16(upper, 2), q, 0xCC);
    *odd  = d2q_merge(_mm256_srli_epi16(q, 2), upper, 0x33);
#else
    // exchanges the upper two bits of q's nibbles for the lower two of upper's
    const __m256i differ = _mm256_and_si256(_mm256_set1_epi8(0x33), _mm256_xor_si256(_mm256_srli_epi16(q, 2), upper));
    *even = _mm256_xor_si256(q, _mm256_slli_epi16(differ, 2));
    *odd  = _mm256_xor_si256(upper, differ);
#endif
}

// both indices of the bytes of a d2q3_64, in their nibbles: of its two groups. Shifts cross byte borders; the masks drop what
// they bring in.
static inline __m256i d2q3_64_indices(const uint8_t * qs, const uint8_t * qh) {
    const __m256i low4 = _mm256_set1_epi8(0x33), high1 = _mm256_set1_epi8((char) 0x88);
    const __m256i before1 = _mm256_set_epi64x(0x4444444444444444, 0x4444444444444400, 0x4444444444444444, 0x4444444444444400);
    const __m256i first_half = _mm256_setr_epi64x(2, 2, 0, 0), second_half = _mm256_setr_epi64x(0, 0, 2, 2);
    const __m256i q = _mm256_and_si256(low4,    _mm256_srlv_epi64(d2q_load_both(qs), second_half));
    const __m256i b = _mm256_and_si256(before1, _mm256_sllv_epi64(d2q_load_both(qs - 1), first_half));
    const __m256i h = _mm256_and_si256(high1,   _mm256_sllv_epi64(d2q_load_8(qh), _mm256_setr_epi64x(3, 2, 1, 0)));
    return _mm256_or_si256(_mm256_or_si256(q, b), h);
}

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define D2Q_DPBUSD // one instruction for d2q_dot_add, whose u may then have 8 bits
#endif

// acc + u*s, u unsigned of 7 bits: two products are at most 2*127*128, so that int16 does not saturate
static inline __m256i d2q_dot_add(__m256i acc, __m256i u, __m256i s) {
#if !defined(D2Q_DPBUSD)
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#elif defined(__AVX512VNNI__)
    return _mm256_dpbusd_epi32(acc, u, s);
#else
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#endif
}

#endif
