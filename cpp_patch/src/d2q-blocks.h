// Where each code of a d2q block lies: the one place in C that knows the bit layout (block structs: ggml-common.h).
// A group is 32 weights with one codebook; these functions give the table entries of group k in the order of the weights.
#pragma once

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "d2q-tables.h"

#define D2Q_GROUP 32

// d2q2, d2q2_64: pair i of group k is (weight i, weight i + 16); even groups in low nibbles, odd groups in high ones
static inline void d2q_pair_group(const uint8_t * qs, uint8_t cb, int k, int8_t * out) {
    const int8_t (*table)[16] = d2q_pair_table[cb];
    for (int i = 0; i < 16; i++) {
        const int code = (qs[16*(k/2) + i] >> (4*(k%2))) & 15;
        out[i]      = table[0][code];
        out[i + 16] = table[1][code];
    }
}

static inline void d2q2_group(const block_d2q2 * x, int k, int8_t * out) {
    d2q_pair_group(x->qs, x->cb[k], k, out);
}

static inline void d2q2_64_group(const block_d2q2_64 * x, int k, int8_t * out) {
    d2q_pair_group(x->qs, x->cb[k], k, out);
}

// The entry of a scalar also depends on the low bit of the code before it. Weights 0 and 16 of a group have none before
// them, which counts as a zero.
static inline void d2q_scalar_group(const uint8_t * codes, uint8_t cb, int8_t * out) {
    const int8_t * table = d2q_scalar_table[cb];
    for (int j = 0; j < D2Q_GROUP; j++) {
        out[j] = table[codes[j] + (j%16 ? 8*(codes[j - 1] & 1) : 0)];
    }
}

// Kernels have tables of their own, whose index has its bits in the order in which they are cheap to put together: the low
// bits of the code, the low bit of the code before, the high bit. This is the canonical index of entry i of such a table.
static inline int d2q_canonical_index(int i) {
    const int low = i & 3, before = i >> 2 & 1, high = i >> 3;
    return low + 4*high + 8*before;
}

// where weight j of group k of a d2q3 has its bits: byte j + 32*(k/4) of qs, which four groups share, and byte j of qh.
// In both, the bits of four groups are two apart, so that a kernel can put the low bits of the codes before, which come
// from qs, between those of qh: then two bits of each register are the index of one group, four groups to a byte.
static inline int d2q3_low_shift (int k) { return 2*(k%4); }
static inline int d2q3_high_shift(int k) { return 2*(k%4) + k/4; }

static inline void d2q3_group(const block_d2q3 * x, int k, int8_t * out) {
    uint8_t codes[D2Q_GROUP];
    for (int j = 0; j < D2Q_GROUP; j++) {
        const int low  = (x->qs[32*(k/4) + j] >> d2q3_low_shift(k)) & 3;
        const int high = (x->qh[j] >> d2q3_high_shift(k)) & 1;
        codes[j] = (uint8_t) (low | high << 2);
    }
    d2q_scalar_group(codes, x->cb[k], out);
}

// d2q3_64: both groups share the 16 bytes of low bits and the 8 bytes of high bits
static inline void d2q3_64_group(const block_d2q3_64 * x, int k, int8_t * out) {
    uint8_t codes[D2Q_GROUP];
    for (int j = 0; j < D2Q_GROUP; j++) {
        const int low  = (x->qs[j%16] >> (4*k + 2*(j/16))) & 3;
        const int high = (x->qh[j%8] >> (4*k + j/8)) & 1;
        codes[j] = (uint8_t) (low | high << 2);
    }
    d2q_scalar_group(codes, x->cb[k], out);
}
