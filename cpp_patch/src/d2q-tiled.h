// The d2q types in the tiled matrix multiplication of the CPU backend (prompt processing on x86): a block becomes plain
// bytes, entry + 128, with all group scales 1; the tile kernel subtracts 128 times the sums of the activations.
#pragma once

#include "d2q-blocks.h"
#include "ggml-cpu/tiled/tiled-kernel.h"

#if defined(__AVX2__)

static inline void d2q_tiled_store(uint8_t * out, __m256i entries) {
    _mm256_storeu_si256((__m256i *) out, _mm256_xor_si256(entries, _mm256_set1_epi8((char) 0x80)));
}

static inline void d2q_tiled_block(const block_d2q2 & x, uint8_t * out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int k = 0; k < 8; k += 2) {
        const __m256i q  = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (x.qs + 8*k)));
        const __m256i t0 = _mm256_load_si256((const __m256i *) d2q_pair_table[x.cb[k]]);
        const __m256i t1 = _mm256_load_si256((const __m256i *) d2q_pair_table[x.cb[k + 1]]);
        d2q_tiled_store(out + 32*k,      _mm256_shuffle_epi8(t0, _mm256_and_si256(q, nibble)));
        d2q_tiled_store(out + 32*k + 32, _mm256_shuffle_epi8(t1, _mm256_and_si256(_mm256_srli_epi16(q, 4), nibble)));
    }
}

static inline void d2q_tiled_block(const block_d2q3 & x, uint8_t * out) {
    const __m256i low2 = _mm256_set1_epi8(3), bit0 = _mm256_set1_epi8(1);
    const __m256i qh = _mm256_loadu_si256((const __m256i *) x.qh);
    for (int k = 0; k < 8; k++) {
        const __m256i qs   = _mm256_loadu_si256((const __m256i *) (x.qs + 32*(k/4)));
        const __m256i low  = _mm256_and_si256(_mm256_srl_epi16(qs, _mm_cvtsi32_si128(2*(k%4))), low2);
        const __m256i high = _mm256_and_si256(_mm256_srl_epi16(qh, _mm_cvtsi32_si128(k)), bit0);
        const __m256i table = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *) d2q_scalar_table[x.cb[k]]));
        d2q_tiled_store(out + 32*k, _mm256_shuffle_epi8(table, _mm256_or_si256(low, _mm256_slli_epi16(high, 2))));
    }
}

#else

static inline void d2q_tiled_groups(const int8_t * entries, uint8_t * out) {
    for (int j = 0; j < D2Q_GROUP; j++) {
        out[j] = (uint8_t) (entries[j] + 128);
    }
}

static inline void d2q_tiled_block(const block_d2q2 & x, uint8_t * out) {
    for (int k = 0; k < 8; k++) {
        int8_t entries[D2Q_GROUP];
        d2q2_group(&x, k, entries);
        d2q_tiled_groups(entries, out + D2Q_GROUP*k);
    }
}

static inline void d2q_tiled_block(const block_d2q3 & x, uint8_t * out) {
    for (int k = 0; k < 8; k++) {
        int8_t entries[D2Q_GROUP];
        d2q3_group(&x, k, entries);
        d2q_tiled_groups(entries, out + D2Q_GROUP*k);
    }
}

#endif

// the tile of n_rows rows and num_k blocks per row, in tiled.cpp's layout for subblocks of 32
template <typename B>
static void d2q_tiled_unpack(const B * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    constexpr int NB = TILED_TILE_K/D2Q_GROUP;
    for (int slab = 0; slab < num_k; slab++) {
        for (int r = 0; r < n_rows; r++) {
            const B & x = rows[r*row_stride + slab];
            tile->d[slab*TILED_MICRO + r] = ggml_fp16_to_fp32(x.d);
            int32_t * scales = &tile->scales[(r*num_k + slab)*NB];
            for (int s = 0; s < NB; s++) {
                scales[s] = 1;
            }
            d2q_tiled_block(x, &tile->q[(r*num_k + slab)*TILED_TILE_K]);
        }
    }
}

static void tiled_unpack_src0(const block_d2q2 * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    d2q_tiled_unpack(rows, row_stride, n_rows, tile, num_k);
}

static void tiled_unpack_src0(const block_d2q3 * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    d2q_tiled_unpack(rows, row_stride, n_rows, tile, num_k);
}
