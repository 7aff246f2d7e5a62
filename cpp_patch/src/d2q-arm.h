// The d2q types on ARM, what the dot product and the matrix multiplication share: the weights of 64 as signed bytes.
// One vqtbl1q_s8 looks up 16 entries of one codebook, signed, so that no offset has to be corrected afterwards.
#pragma once

#include "d2q-cpu.h"

#if defined(D2Q_ARM)

#include "d2q-blocks.h"

#include <arm_neon.h>

extern int8_t d2q_scalar_table_arm[256][16]; // in the order of d2q_canonical_index; d2q_cpu_init makes it

// the entries that 16 bytes of nibble codes select from a codebook of pairs: first components (0) or second ones (1)
static inline int8x16_t d2q_pair_entries(const uint8_t * cb, int component, uint8x16_t codes) {
    return vqtbl1q_s8(vld1q_s8(d2q_pair_table[*cb][component]), codes);
}

static inline int8x16_t d2q_scalar_entries(const uint8_t * cb, uint8x16_t indices) {
    return vqtbl1q_s8(vld1q_s8(d2q_scalar_table_arm[*cb]), indices);
}

static inline int8x16x4_t d2q_pair_weights(const uint8_t * qs, const uint8_t * cb) {
    const uint8x16_t q = vld1q_u8(qs), even = vandq_u8(q, vdupq_n_u8(15)), odd = vshrq_n_u8(q, 4);
    const int8x16x4_t w = {{
        d2q_pair_entries(cb,     0, even), d2q_pair_entries(cb,     1, even),
        d2q_pair_entries(cb + 1, 0, odd),  d2q_pair_entries(cb + 1, 1, odd),
    }};
    return w;
}

// The bits that complete the low bits q of 16 weights of four groups to indices, in q's places: the high bit, which h has
// in the odd bits, over the low bit of the code before, which is that of the byte before.
static inline uint8x16_t d2q_upper_bits(uint8x16_t q, uint8x16_t h) {
    return vbslq_u8(vdupq_n_u8(0x55), vextq_u8(vdupq_n_u8(0), q, 15), h);
}

// indices of 16 weights of four groups, two in the nibbles of a register: of the first and the third group, then of the
// second and the fourth
static inline uint8x16x2_t d2q_indices(uint8x16_t q, uint8x16_t upper) {
    const uint8x16_t low4 = vdupq_n_u8(0x33);
    const uint8x16x2_t indices = {{ vbslq_u8(low4, q, vshlq_n_u8(upper, 2)), vbslq_u8(low4, vshrq_n_u8(q, 2), upper) }};
    return indices;
}

static inline uint8x16_t d2q_nibble(uint8x16_t indices, int high) {
    return high ? vshrq_n_u8(indices, 4) : vandq_u8(indices, vdupq_n_u8(15));
}

// the weights 64*t..64*t+63 of a block, in order
static inline int8x16x4_t d2q2_weights(const block_d2q2 * x, int t) {
    return d2q_pair_weights(x->qs + 16*t, x->cb + 2*t);
}

// indices of the first or second 16 weights (run 0, 1) of the groups 4*half..4*half+3
static inline uint8x16x2_t d2q3_indices(const block_d2q3 * x, int half, int run) {
    const uint8x16_t q = vld1q_u8(x->qs + 32*half + 16*run), h = vld1q_u8(x->qh + 16*run);
    return d2q_indices(q, d2q_upper_bits(q, half ? h : vaddq_u8(h, h)));
}

static inline int8x16x4_t d2q3_weights(const block_d2q3 * x, int t) {
    const uint8_t * cb = x->cb + 2*t;
    const uint8x16x2_t first = d2q3_indices(x, t/2, 0), second = d2q3_indices(x, t/2, 1);
    const int8x16x4_t w = {{
        d2q_scalar_entries(cb,     d2q_nibble(first.val[0], t%2)), d2q_scalar_entries(cb,     d2q_nibble(second.val[0], t%2)),
        d2q_scalar_entries(cb + 1, d2q_nibble(first.val[1], t%2)), d2q_scalar_entries(cb + 1, d2q_nibble(second.val[1], t%2)),
    }};
    return w;
}

static inline int8x16x4_t d2q2_64_weights(const block_d2q2_64 * x, int t) {
    (void) t; // the block has no more than 64
    return d2q_pair_weights(x->qs, x->cb);
}

static inline int8x16x4_t d2q3_64_weights(const block_d2q3_64 * x, int t) {
    (void) t;
    // byte i of qh has the high bits of weight i in the even bits and those of weight i + 8 in the odd ones
    const uint8x8_t  h = vld1_u8(x->qh);
    const uint8x16_t q = vld1q_u8(x->qs), upper = d2q_upper_bits(q, vcombine_u8(vadd_u8(h, h), h));
    const uint8x16x2_t indices = d2q_indices(q, upper);
    const int8x16x4_t w = {{
        d2q_scalar_entries(x->cb,     d2q_nibble(indices.val[0], 0)), d2q_scalar_entries(x->cb,     d2q_nibble(indices.val[1], 0)),
        d2q_scalar_entries(x->cb + 1, d2q_nibble(indices.val[0], 1)), d2q_scalar_entries(x->cb + 1, d2q_nibble(indices.val[1], 1)),
    }};
    return w;
}

#endif
