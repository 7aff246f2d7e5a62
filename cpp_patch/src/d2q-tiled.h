// The d2q types in the tiled matrix multiplication of the CPU backend (prompt processing on x86). A block becomes plain
// bytes. Its groups have no scales of their own, so that a product over the whole block stays in integers: we bring our
// own 16x16 tile kernel, which multiplies by scales once in 256 weights where those of the K types do so every 16 or 32.
#pragma once

#include "d2q-blocks.h"
#include "d2q-x86.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "ggml-cpu/tiled/tiled-kernel.h"

#if defined(D2Q_X86)

// A tile of ours is one with subblocks of 256, which no stock type has: the functions of tiled-kernel.h are specialized
// for it. Its bytes are entry + 64, and its scales are not set.
#define D2Q_TILED_ARGUMENTS 256, false, 64, false

static inline void d2q_tiled_block(const block_d2q2 & x, uint8_t * out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int k = 0; k < 8; k += 2) {
        const __m256i q  = d2q_load_both(x.qs + 8*k);
        const __m256i w0 = _mm256_shuffle_epi8(d2q_load(d2q_pair_table_u7[x.cb[k]]),     _mm256_and_si256(q, nibble));
        const __m256i w1 = _mm256_shuffle_epi8(d2q_load(d2q_pair_table_u7[x.cb[k + 1]]), _mm256_and_si256(_mm256_srli_epi16(q, 4), nibble));
        _mm256_store_si256((__m256i *) (out + 32*k),      w0);
        _mm256_store_si256((__m256i *) (out + 32*k + 32), w1);
    }
}

static inline void d2q_tiled_block(const block_d2q3 & x, uint8_t * out) {
    const __m256i qh = d2q_load(x.qh);
    for (int half = 0; half < 2; half++) {
        __m256i even, odd;
        d2q3_indices(x.qs + 32*half, half ? qh : _mm256_add_epi8(qh, qh), &even, &odd);
        const __m256i indices[4] = { even, odd, _mm256_srli_epi16(even, 4), _mm256_srli_epi16(odd, 4) };
        for (int s = 0; s < 4; s++) {
            const int k = 4*half + s;
            _mm256_store_si256((__m256i *) (out + 32*k), d2q_lookup(d2q_load_both(d2q_scalar_table_u7[x.cb[k]]), indices[s]));
        }
    }
}

// the tile of n_rows rows and num_k blocks per row
template <typename B>
static void d2q_tiled_unpack(const B * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    for (int r = 0; r < n_rows; r++) {
        for (int slab = 0; slab < num_k; slab++) {
            const B & x = rows[r*row_stride + slab];
            tile->d[slab*TILED_MICRO + r] = GGML_CPU_FP16_TO_FP32(x.d);
            d2q_tiled_block(x, &tile->q[(r*num_k + slab)*TILED_TILE_K]);
        }
    }
}

template <> inline void tiled_repack_src0<256>(tiled_tile_src0 *, int, int, int, bool) {}

// One block of 16 rows times 16 columns. The geometry is tiled-kernel.cpp's: `row` bytes between rows of a tile, and the
// sums of columns 256 (one slab) or 16 apart.
struct d2q_tiled_place {
    int row, sums;
    const uint8_t * weights;
    const int8_t  * activations;
    const int32_t * bsums;
    const float   * d0, * d1;
    float         * out;
};

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

// activations come interleaved: 4 of each column in 64 bytes, group g in row g%16
static inline void d2q_tiled_16x16(const d2q_tiled_place & at, int stride) {
    __m512i offset = _mm512_load_si512(at.bsums);
    for (int s = 1; s < 16; s++) {
        offset = _mm512_add_epi32(offset, _mm512_load_si512(at.bsums + s*at.sums));
    }
    offset = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(offset, 6));

    __m512i acc[16];
    for (int r = 0; r < 16; r++) { acc[r] = offset; }
    for (int c = 0; c < 4; c++) {
#pragma GCC unroll 4
        for (int g = 0; g < 16; g++) {
            const __m512i y = _mm512_load_si512(at.activations + g*at.row + 64*c);
            for (int r = 0; r < 16; r++) {
                int32_t w;
                memcpy(&w, at.weights + r*at.row + 64*c + 4*g, 4);
                acc[r] = _mm512_dpbusd_epi32(acc[r], _mm512_set1_epi32(w), y);
            }
        }
    }
    const __m512 d1 = _mm512_load_ps(at.d1);
    for (int r = 0; r < 16; r++) {
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r]), _mm512_set1_ps(at.d0[r]));
        float * out = at.out + r*stride;
        _mm512_store_ps(out, _mm512_fmadd_ps(sum, d1, _mm512_load_ps(out)));
    }
}

#else

// eight vectors' sums
static inline __m256i d2q_sums(const __m256i * v) {
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

static inline void d2q_tiled_16x16(const d2q_tiled_place & at, int stride) {
    for (int j = 0; j < 16; j += 8) {
        __m256i offset = d2q_load(at.bsums + j);
        for (int s = 1; s < 16; s++) {
            offset = _mm256_add_epi32(offset, d2q_load(at.bsums + s*at.sums + j));
        }
        offset = _mm256_slli_epi32(offset, 6);
        const __m256 d1 = _mm256_loadu_ps(at.d1 + j);
        for (int r = 0; r < 16; r++) {
            __m256i acc[8];
            for (int c = 0; c < 8; c++) { acc[c] = _mm256_setzero_si256(); }
            for (int k = 0; k < TILED_TILE_K; k += 32) {
                const __m256i w = d2q_load(at.weights + r*at.row + k);
#pragma GCC unroll 8
                for (int c = 0; c < 8; c++) { acc[c] = d2q_dot_add(acc[c], w, d2q_load(at.activations + (j + c)*at.row + k)); }
            }
            const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(d2q_sums(acc), offset)), _mm256_set1_ps(at.d0[r]));
            float * out = at.out + r*stride + j;
            _mm256_storeu_ps(out, _mm256_fmadd_ps(sum, d1, _mm256_loadu_ps(out)));
        }
    }
}

#endif

template <>
inline void tiled_run_microtile<D2Q_TILED_ARGUMENTS>(const tiled_tile_src0 & src0, const tiled_tile_src1 & src1,
                                                     int i0, int j0, int num_k, int slab, float * buf, int buf_stride) {
    const int row = num_k*TILED_TILE_K, sums = num_k == 1 ? TILED_TILE_ROWS : TILED_MICRO;
    d2q_tiled_place at = { row, sums, src0.q + i0*row + slab*TILED_TILE_K, src1.q + j0*row + slab*TILED_TILE_K,
        src1.bsums + slab*TILED_MICRO*sums + j0, src0.d + slab*TILED_MICRO + i0, src1.d + slab*TILED_MICRO + j0, buf + i0*buf_stride + j0 };
    if (num_k == 1) { // the usual case, with constants for the compiler
        at.row = TILED_TILE_K;
        d2q_tiled_16x16(at, TILED_TILE_ROWS);
    } else {
        d2q_tiled_16x16(at, buf_stride);
    }
}

#else

// the stock kernels' tile for subblocks of 32: entry + 128, all scales 1
#define D2Q_TILED_ARGUMENTS 32, false, 128, true

static inline void d2q_tiled_block(const block_d2q2 & x, int k, int8_t * entries) { d2q2_group(&x, k, entries); }
static inline void d2q_tiled_block(const block_d2q3 & x, int k, int8_t * entries) { d2q3_group(&x, k, entries); }

template <typename B>
static void d2q_tiled_unpack(const B * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    constexpr int NB = TILED_TILE_K/D2Q_GROUP;
    for (int r = 0; r < n_rows; r++) {
        for (int slab = 0; slab < num_k; slab++) {
            const B & x = rows[r*row_stride + slab];
            const int block = r*num_k + slab;
            tile->d[slab*TILED_MICRO + r] = GGML_CPU_FP16_TO_FP32(x.d);
            for (int k = 0; k < NB; k++) {
                int8_t entries[D2Q_GROUP];
                d2q_tiled_block(x, k, entries);
                tile->scales[block*NB + k] = 1;
                for (int j = 0; j < D2Q_GROUP; j++) {
                    tile->q[block*TILED_TILE_K + D2Q_GROUP*k + j] = (uint8_t) (entries[j] + 128);
                }
            }
        }
    }
}

#endif

static void tiled_unpack_src0(const block_d2q2 * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    d2q_tiled_unpack(rows, row_stride, n_rows, tile, num_k);
}

static void tiled_unpack_src0(const block_d2q3 * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    d2q_tiled_unpack(rows, row_stride, n_rows, tile, num_k);
}
