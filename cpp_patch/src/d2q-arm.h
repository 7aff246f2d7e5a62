// The d2q types on ARM, what the dot product and the matrix multiplication share: the weights of 64 as signed bytes.
// One vqtbl1q_s8 looks up 16 entries of one codebook, signed, so that no offset has to be corrected afterwards.
#pragma once

#include "d2q-cpu.h"

#if defined(D2Q_ARM)

#include "d2q-blocks.h"

#include <arm_neon.h>

// the entries that 16 bytes of nibble codes select from a codebook of pairs: first components (0) or second ones (1)
static inline int8x16_t d2q_pair_entries(const uint8_t * cb, int component, uint8x16_t codes) {
    return vqtbl1q_s8(vld1q_s8(d2q_pair_table[*cb][component]), codes);
}

// codes 0..7 only ever reach the lower half of the register
static inline int8x16_t d2q_scalar_entries(const uint8_t * cb, uint8x16_t codes) {
    return vqtbl1q_s8(vcombine_s8(vld1_s8(d2q_scalar_table[*cb]), vdup_n_s8(0)), codes);
}

static inline int8x16x4_t d2q_pair_weights(const uint8_t * qs, const uint8_t * cb) {
    const uint8x16_t q = vld1q_u8(qs), even = vandq_u8(q, vdupq_n_u8(15)), odd = vshrq_n_u8(q, 4);
    const int8x16x4_t w = {{
        d2q_pair_entries(cb,     0, even), d2q_pair_entries(cb,     1, even),
        d2q_pair_entries(cb + 1, 0, odd),  d2q_pair_entries(cb + 1, 1, odd),
    }};
    return w;
}

// codes of 16 weights of group k: bits 2*(k%4) of q and bit k of h. Inserting shifts keep the low bits of their first
// operand (sli) or the high ones (sri), which joins the two parts in one instruction.
static inline uint8x16_t d2q3_codes(uint8x16_t q, uint8x16_t h, int k) {
    const uint8x16_t low2 = vdupq_n_u8(3), low3 = vdupq_n_u8(7);
    switch (k) {
        case 0:  return vandq_u8(vsliq_n_u8(q, h, 2), low3);
        case 1:  return vandq_u8(vsliq_n_u8(vshrq_n_u8(q, 2), vshrq_n_u8(h, 1), 2), low3);
        case 2:  return vandq_u8(vbslq_u8(low2, vshrq_n_u8(q, 4), h), low3);
        case 3:  return vshrq_n_u8(vsriq_n_u8(vshlq_n_u8(h, 4), q, 1), 5);
        case 4:  return vandq_u8(vsliq_n_u8(q, vshrq_n_u8(h, 4), 2), low3);
        case 5:  return vandq_u8(vsliq_n_u8(vshrq_n_u8(q, 2), vshrq_n_u8(h, 5), 2), low3);
        case 6:  return vandq_u8(vbslq_u8(low2, vshrq_n_u8(q, 4), vshrq_n_u8(h, 4)), low3);
        default: return vshrq_n_u8(vsriq_n_u8(h, q, 1), 5);
    }
}

// the weights 64*t..64*t+63 of a block, in order
static inline int8x16x4_t d2q2_weights(const block_d2q2 * x, int t) {
    return d2q_pair_weights(x->qs + 16*t, x->cb + 2*t);
}

static inline int8x16x4_t d2q3_weights(const block_d2q3 * x, int t) {
    const uint8_t * qs = x->qs + 32*(t/2), * cb = x->cb + 2*t;
    const uint8x16_t q0 = vld1q_u8(qs), q1 = vld1q_u8(qs + 16), h0 = vld1q_u8(x->qh), h1 = vld1q_u8(x->qh + 16);
    const int8x16x4_t w = {{
        d2q_scalar_entries(cb,     d2q3_codes(q0, h0, 2*t)),     d2q_scalar_entries(cb,     d2q3_codes(q1, h1, 2*t)),
        d2q_scalar_entries(cb + 1, d2q3_codes(q0, h0, 2*t + 1)), d2q_scalar_entries(cb + 1, d2q3_codes(q1, h1, 2*t + 1)),
    }};
    return w;
}

static inline int8x16x4_t d2q2_64_weights(const block_d2q2_64 * x, int t) {
    (void) t; // the block has no more than 64
    return d2q_pair_weights(x->qs, x->cb);
}

static inline int8x16x4_t d2q3_64_weights(const block_d2q3_64 * x, int t) {
    (void) t;
    const uint8x16_t q = vld1q_u8(x->qs), low2 = vdupq_n_u8(0x33), low3 = vdupq_n_u8(7);
    // bit 2*i of h belongs to the bits 2*i and 2*i + 1 of q; two codes fit side by side into a byte
    const uint8x8_t  h8 = vld1_u8(x->qh);
    const uint8x16_t h  = vcombine_u8(h8, vshr_n_u8(h8, 1));
    const uint8x16_t first = vbslq_u8(low2, q, vshlq_n_u8(h, 2)), second = vbslq_u8(low2, vshrq_n_u8(q, 2), h);
    const int8x16x4_t w = {{
        d2q_scalar_entries(x->cb,     vandq_u8(first, low3)),
        d2q_scalar_entries(x->cb,     vandq_u8(second, low3)),
        d2q_scalar_entries(x->cb + 1, vandq_u8(vshrq_n_u8(first, 4), low3)),
        d2q_scalar_entries(x->cb + 1, vandq_u8(vshrq_n_u8(second, 4), low3)),
    }};
    return w;
}

#endif
