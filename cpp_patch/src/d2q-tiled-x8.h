// Interleaved rows of the d2q types (d2q-repack.h) in the tiled matrix multiplication: eight rows at a time become rows as
// the file has them, and are unpacked like those. Up to 256 columns share that.
#pragma once

#include "d2q-repack.h"
#include "d2q-tiled.h"

// how many rows share a block: for interleaved ones, a tile's pointer advances by eight blocks' bytes for each 256 weights,
// and a thread's share of the rows begins at a multiple of eight
template <typename B> constexpr int tiled_rows_of_block() { return 1; }

#if defined(D2Q_REPACK)

template <> constexpr int tiled_rows_of_block<block_d2q2x8>() { return D2Q_ROWS; }
template <> constexpr int tiled_rows_of_block<block_d2q3x8>() { return D2Q_ROWS; }

static inline void d2q_row(const block_d2q2x8 & x, int r, block_d2q2 * out) { d2q2_row(&x, r, out); }
static inline void d2q_row(const block_d2q3x8 & x, int r, block_d2q3 * out) { d2q3_row(&x, r, out); }

// row_stride: blocks of a row, and so of eight rows
template <typename B, typename B8>
static void d2q_tiled_unpack_x8(const B8 * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    for (int r = 0; r < n_rows; r++) {
        for (int slab = 0; slab < num_k; slab++) {
            B x;
            d2q_row(rows[r/D2Q_ROWS*row_stride + slab], r%D2Q_ROWS, &x);
            tile->d[slab*TILED_MICRO + r] = GGML_CPU_FP16_TO_FP32(x.d);
            d2q_tiled_block(x, &tile->q[(r*num_k + slab)*TILED_TILE_K]);
        }
    }
}

static void tiled_unpack_src0(const block_d2q2x8 * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    d2q_tiled_unpack_x8<block_d2q2>(rows, row_stride, n_rows, tile, num_k);
}

static void tiled_unpack_src0(const block_d2q3x8 * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {
    d2q_tiled_unpack_x8<block_d2q3>(rows, row_stride, n_rows, tile, num_k);
}

#endif
