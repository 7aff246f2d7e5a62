// Vectors of eight floats, one per row of a matrix or one per codebook, and what ISO C lacks for them.
//
// GCC's and Clang's vector extensions do the arithmetic on every CPU. Minimum and choice, which compilers don't
// recognize in them, have instructions where x86 has AVX.

#ifndef D2Q_LANES_H
#define D2Q_LANES_H

#include <math.h>
#include <stdint.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

enum { LANES = 8 };

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t lane_ints __attribute__((vector_size(4 * LANES)));
// One element of an array of lanes.
typedef float lane __attribute__((may_alias));
typedef int32_t lane_int __attribute__((may_alias));

static inline lanes all(float value) {
    return (lanes){value, value, value, value, value, value, value, value};
}

static inline lanes load(const float *from) {
    lanes values;
    __builtin_memcpy(&values, from, sizeof values);
    return values;
}

// Less-than gives all ones where it holds.
static inline lane_ints less(lanes a, lanes b) {
#if defined(__AVX__)
    return (lane_ints)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ);
#else
    return a < b;
#endif
}

static inline lanes where(lane_ints mask, lanes a, lanes b) {
#if defined(__AVX__)
    return (lanes)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (lanes)((mask & (lane_ints)a) | (~mask & (lane_ints)b));
#endif
}

static inline lanes smaller(lanes a, lanes b) {
#if defined(__AVX__)
    return (lanes)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return where(less(a, b), a, b);
#endif
}

static inline lane_ints smaller_ints(lane_ints a, lane_ints b) {
#if defined(__AVX2__)
    return (lane_ints)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
    return (lane_ints)where(a < b, (lanes)a, (lanes)b);
#endif
}

// In this order on every CPU.
static inline float sum(lanes values) {
    float half[4];
    for (int i = 0; i < 4; i++) half[i] = values[i] + values[i + 4];
    return (half[0] + half[2]) + (half[1] + half[3]);
}

// Adds sign * left [inner] times right [inner, columns], whose rows are `stride` apart, to target [columns].
static inline __attribute__((always_inline)) void add_product(
    lanes *restrict target, float sign, const lanes *restrict left, const float *restrict right, int64_t stride,
    int inner, int columns
) {
    // Four columns at a time stay in registers.
    for (int column = 0; column < columns; column += 4) {
        lanes part[4] = {{0}};
        for (int j = 0; j < inner; j++) {
            const float *factor = right + j * stride + column;
            for (int i = 0; i < 4; i++) part[i] += left[j] * factor[i];
        }
        for (int i = 0; i < 4; i++) target[column + i] += sign * part[i];
    }
}

#endif
