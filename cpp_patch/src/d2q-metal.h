// The d2q types in Metal's kernels/dequantize.h: 16 consecutive weights of a block, for mul_mm, mul_mv_ext and get_rows.
// A line of its own with #include "d2q/..." is what ggml's CMakeLists.txt replaces by this file to embed it.

// weight as stored in a table word: entries are signed bytes
static inline float d2q_entry(uint word, short byte) {
    return (float) (int8_t) (word >> 8*byte);
}

// A table is four words. The low bits of the code choose the byte; `upper`, its high bit and over that the low bit of the
// code before it, chooses the word.
static inline float d2q_scalar_entry(uint4 table, uint low, uint upper) {
    const uint even = upper & 1 ? table.y : table.x;
    const uint odd  = upper & 1 ? table.w : table.z;
    return d2q_entry(upper & 2 ? odd : even, low);
}

static inline uint4 d2q_scalar_words(uint8_t cb) {
    constant uint * words = d2q_scalar_table[cb];
    return uint4(words[0], words[1], words[2], words[3]);
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

// il: group k = il/2, its first or second 16 weights, of which the first one has no code before it
template <typename type4x4>
void dequantize_d2q3(device const block_d2q3 * xb, short il, thread type4x4 & reg) {
    const float d = xb->d;
    const short k = il/2;
    const uint4 table = d2q_scalar_words(xb->cb[k]);
    device const uint16_t * qs = (device const uint16_t *) xb->qs + 16*(k/4) + 8*(il%2);
    device const uint16_t * qh = (device const uint16_t *) xb->qh + 8*(il%2);

    uint before = 0;
    FOR_UNROLL (short i = 0; i < 16; ++i) {
        const short byte = 8*(i%2);
        const uint low  = (qs[i/2] >> (byte + 2*(k%4))) & 3;
        const uint high = (qh[i/2] >> (byte + 2*(k%4) + k/4)) & 1;
        reg[i/4][i%4] = d * d2q_scalar_entry(table, low, high | before << 1);
        before = low & 1;
    }
}

// the same; both groups and both halves share the bytes
template <typename type4x4>
void dequantize_d2q3_64(device const block_d2q3_64 * xb, short il, thread type4x4 & reg) {
    const float d = xb->d;
    const uint4 table = d2q_scalar_words(xb->cb[il/2]);
    device const uint16_t * qs = (device const uint16_t *) xb->qs;
    device const uint16_t * qh = (device const uint16_t *) xb->qh;

    uint before = 0;
    FOR_UNROLL (short i = 0; i < 16; ++i) {
        const short byte = 8*(i%2);
        const uint low  = (qs[i/2]     >> (byte + 2*il)) & 3;
        const uint high = (qh[(i%8)/2] >> (byte + 2*il + i/8)) & 1;
        reg[i/4][i%4] = d * d2q_scalar_entry(table, low, high | before << 1);
        before = low & 1;
    }
}
