// The d2q types in Metal's kernels/dequantize.h: 16 consecutive weights of a block, for mul_mm, mul_mv_ext and get_rows.
// A line of its own with #include "d2q/..." is what ggml's CMakeLists.txt replaces by this file to embed it.

// weight as stored in a table word: entries are signed bytes
static inline float d2q_entry(uint word, short byte) {
    return (float) (int8_t) (word >> 8*byte);
}

// codes are 3 bits, so that a table is eight bytes: the high bit chooses the word, the low ones the byte
static inline float d2q_scalar_entry(uint2 table, uint low, uint high) {
    return d2q_entry(high ? table.y : table.x, low);
}

static inline uint2 d2q_scalar_words(uint8_t cb) {
    return uint2(d2q_scalar_table[cb][0], d2q_scalar_table[cb][1]);
}

// il: group il/2, first or second component of its 16 pairs
template <typename block_t, typename type4x4>
static inline void d2q_dequantize_pairs(device const block_t * xb, short il, thread type4x4 & reg) {
    const float d = xb->d;
    constant ushort * table = d2q_pair_table[xb->cb[il/2]];
    device const uint16_t * qs = (device const uint16_t *) xb->qs + 8*(il/4);
    const short nibble = 4*((il/2)%2);

    FOR_UNROLL (short i = 0; i < 16; ++i) {
        const ushort code = (qs[i/2] >> (8*(i%2) + nibble)) & 15;
        reg[i/4][i%4] = d * d2q_entry(table[code], il%2);
    }
}

template <typename type4x4>
void dequantize_d2q2(device const block_d2q2 * xb, short il, thread type4x4 & reg) {
    d2q_dequantize_pairs(xb, il, reg);
}

template <typename type4x4>
void dequantize_d2q2_64(device const block_d2q2_64 * xb, short il, thread type4x4 & reg) {
    d2q_dequantize_pairs(xb, il, reg);
}

// il: group k = il/2, its first or second 16 weights
template <typename type4x4>
void dequantize_d2q3(device const block_d2q3 * xb, short il, thread type4x4 & reg) {
    const float d = xb->d;
    const short k = il/2;
    const uint2 table = d2q_scalar_words(xb->cb[k]);
    device const uint16_t * qs = (device const uint16_t *) xb->qs + 16*(k/4) + 8*(il%2);
    device const uint16_t * qh = (device const uint16_t *) xb->qh + 8*(il%2);

    FOR_UNROLL (short i = 0; i < 16; ++i) {
        const short byte = 8*(i%2);
        const uint low  = (qs[i/2] >> (byte + 2*(k%4))) & 3;
        const uint high = (qh[i/2] >> (byte + k)) & 1;
        reg[i/4][i%4] = d * d2q_scalar_entry(table, low, high);
    }
}

// the same; both groups and both halves share the bytes
template <typename type4x4>
void dequantize_d2q3_64(device const block_d2q3_64 * xb, short il, thread type4x4 & reg) {
    const float d = xb->d;
    const uint2 table = d2q_scalar_words(xb->cb[il/2]);
    device const uint16_t * qs = (device const uint16_t *) xb->qs;
    device const uint16_t * qh = (device const uint16_t *) xb->qh;

    FOR_UNROLL (short i = 0; i < 16; ++i) {
        const short byte = 8*(i%2);
        const uint low  = (qs[i/2]     >> (byte + 2*il)) & 3;
        const uint high = (qh[(i%8)/2] >> (byte + 2*il + i/8)) & 1;
        reg[i/4][i%4] = d * d2q_scalar_entry(table, low, high);
    }
}
