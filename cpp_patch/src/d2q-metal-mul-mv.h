// The d2q types in Metal's kernels/mul_mv.metal: matrix times vector. A block is shared by neighbouring lanes, each with
// the codes of whole bytes; the lanes of a block look up in the same codebook, 32 bytes of the table (README.md says why).
// Each type has two functions: the activations that a lane needs, and the dot product of a lane's weights with them.

// ---- pairs: a row of 16 code bytes serves 64 weights; weight 16*h + i of them is in byte i ----

// lane il of `lanes` takes the bytes n*il.. of each row, n = 16/lanes, in y's order: row, quarter h, byte
template <short rows, short lanes>
static inline void d2q_pairs_load(device const float * y, short il, thread float * yl) {
    constexpr short n = 16/lanes;
    FOR_UNROLL (short r = 0; r < rows; ++r) {
        FOR_UNROLL (short h = 0; h < 4; ++h) {
            FOR_UNROLL (short b = 0; b < n; ++b) {
                yl[(4*r + h)*n + b] = y[64*r + 16*h + n*il + b];
            }
        }
    }
}

template <short rows, short lanes>
static inline float d2q_pairs_dot(device const uint8_t * xcb, device const uint8_t * xqs, short il, thread const float * yl) {
    constexpr short n = 16/lanes;
    device const uint16_t * cb = (device const uint16_t *) xcb;
    device const uint16_t * qs = (device const uint16_t *) (xqs + n*il);

    float4 acc = float4(0.f);
    FOR_UNROLL (short r = 0; r < rows; ++r) {
        constant ushort * even = d2q_pair_table[cb[r] & 0xFF];
        constant ushort * odd  = d2q_pair_table[cb[r] >> 8];
        thread const float * yr = yl + 4*n*r;
        FOR_UNROLL (short b = 0; b < n; ++b) {
            const ushort q = qs[8*r + b/2] >> 8*(b%2);
            const ushort e = even[q & 15];
            const ushort o = odd[(q >> 4) & 15];
            acc[0] += yr[      b] * d2q_entry(e, 0);
            acc[1] += yr[  n + b] * d2q_entry(e, 1);
            acc[2] += yr[2*n + b] * d2q_entry(o, 0);
            acc[3] += yr[3*n + b] * d2q_entry(o, 1);
        }
    }
    return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

static inline void d2q_lane_load(device const block_d2q2 *, device const float * y, short il, thread float * yl) {
    d2q_pairs_load<4, 8>(y, il, yl);
}

static inline float d2q_lane_dot(device const block_d2q2 * x, short il, thread const float * yl) {
    return d2q_pairs_dot<4, 8>(x->cb, x->qs, il, yl);
}

static inline void d2q_lane_load(device const block_d2q2_64 *, device const float * y, short il, thread float * yl) {
    d2q_pairs_load<1, 4>(y, il, yl);
}

static inline float d2q_lane_dot(device const block_d2q2_64 * x, short il, thread const float * yl) {
    return d2q_pairs_dot<1, 4>(x->cb, x->qs, il, yl);
}

// ---- d2q3: byte j of the low and of the high bits belongs to weight j of every group; a lane takes four such j ----

// What chooses a table's word, two bits for each weight where `low` has its low bits: the high bits, which h has in the
// even bits, and over them the low bits of the codes before, a byte further down; `first` is the byte below the lowest.
static inline uint d2q_upper_bits(uint low, uint first, uint h) {
    return (h & 0x55555555) | (((low << 8 | first) & 0x55555555) << 1);
}

static inline void d2q_lane_load(device const block_d2q3 *, device const float * y, short il, thread float * yl) {
    FOR_UNROLL (short k = 0; k < 8; ++k) {
        FOR_UNROLL (short b = 0; b < 4; ++b) {
            yl[4*k + b] = y[32*k + 4*il + b];
        }
    }
}

static inline float d2q_lane_dot(device const block_d2q3 * x, short il, thread const float * yl) {
    device const uint8_t  * bytes = x->qs + 4*il;
    device const uint16_t * qs = (device const uint16_t *) bytes;
    device const uint16_t * qh = (device const uint16_t *) x->qh + 2*il;
    const uint low[2] = { qs[0] | (uint) qs[1] << 16, qs[16] | (uint) qs[17] << 16 };
    const uint high   = qh[0] | (uint) qh[1] << 16;
    const bool inside = il%4 != 0; // of a run of 16 weights, whose first one has no code before it
    const uint upper[2] = { d2q_upper_bits(low[0], inside ? bytes[-1] : 0, high), d2q_upper_bits(low[1], inside ? bytes[31] : 0, high >> 1) };

    float sum = 0.f;
    FOR_UNROLL (short k = 0; k < 8; ++k) {
        const uint4 table = d2q_scalar_words(x->cb[k]);
        FOR_UNROLL (short b = 0; b < 4; ++b) {
            const short shift = 8*b + 2*(k%4);
            sum += yl[4*k + b] * d2q_scalar_entry(table, (low[k/4] >> shift) & 3, (upper[k/4] >> shift) & 3);
        }
    }
    return sum;
}

// ---- d2q3_64: byte i of the high bits has those of the weights i + 8*m; a lane takes two such i ----

static inline void d2q_lane_load(device const block_d2q3_64 *, device const float * y, short il, thread float * yl) {
    FOR_UNROLL (short k = 0; k < 2; ++k) {
        FOR_UNROLL (short m = 0; m < 4; ++m) {
            FOR_UNROLL (short b = 0; b < 2; ++b) {
                yl[8*k + 2*m + b] = y[32*k + 8*m + 2*il + b];
            }
        }
    }
}

static inline float d2q_lane_dot(device const block_d2q3_64 * x, short il, thread const float * yl) {
    device const uint8_t  * bytes = x->qs + 2*il;
    device const uint16_t * qs = (device const uint16_t *) bytes;
    const uint low[2] = { qs[0], qs[4] };
    const uint high   = ((device const uint16_t *) x->qh)[il];
    const uint upper[2] = { d2q_upper_bits(low[0], il ? bytes[-1] : 0, high), d2q_upper_bits(low[1], bytes[7], high >> 1) };

    float sum = 0.f;
    FOR_UNROLL (short k = 0; k < 2; ++k) {
        const uint4 table = d2q_scalar_words(x->cb[k]);
        FOR_UNROLL (short m = 0; m < 4; ++m) {
            FOR_UNROLL (short b = 0; b < 2; ++b) {
                const short shift = 8*b + 4*k + 2*(m/2);
                sum += yl[8*k + 2*m + b] * d2q_scalar_entry(table, (low[m%2] >> shift) & 3, (upper[m%2] >> shift) & 3);
            }
        }
    }
    return sum;
}

// ---- the kernel: a simdgroup computes nr0 rows, 32/lanes blocks of each at a time ----

template<typename block_t, short qk, short lanes, int nr0, typename args_t>
void kernel_mul_mv_d2q_f32_impl(
        args_t args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        threadgroup  char * shmem,
        uint3  tgpig,
        ushort tiisg,
        ushort sgitg) {
    const short NSG = FC_mul_mv_nsg;

    const int nb = args.ne00/qk;

    const int r1 = tgpig.y;
    const int im = tgpig.z;

    const int first_row = (tgpig.x * NSG + sgitg) * nr0;

    const uint i12 = im%FC_mul_mv_ne12;
    const uint i13 = im/FC_mul_mv_ne12;

    const uint64_t offset0 = (i12/FC_mul_mv_r2)*args.nb02 + (i13/FC_mul_mv_r3)*args.nb03;
    const uint64_t offset1 = r1*args.nb11 + (i12)*args.nb12 + (i13)*args.nb13;

    device const float * y = (device const float *) (src1 + offset1);

    // past the last row: the last row again, so that nothing outside of the matrix is read
    device const block_t * x[nr0];
    FOR_UNROLL (short row = 0; row < nr0; ++row) {
        x[row] = (device const block_t *) (src0 + offset0 + (uint64_t) min(first_row + row, args.ne01 - 1)*args.nb01);
    }

    const short ix = tiisg/lanes;
    const short il = tiisg%lanes;

    float yl[qk/lanes];
    float sumf[nr0] = { 0.f };

    for (int ib = ix; ib < nb; ib += 32/lanes) {
        d2q_lane_load(x[0], y + ib*qk, il, yl);

        FOR_UNROLL (short row = 0; row < nr0; ++row) {
            sumf[row] += (float) x[row][ib].d * d2q_lane_dot(x[row] + ib, il, yl);
        }
    }

    device float * dst_f32 = (device float *) dst + (uint64_t)im*args.ne0*args.ne1 + (uint64_t)r1*args.ne0;

    for (int row = 0; row < nr0 && first_row + row < args.ne0; ++row) {
        const float sum_all = simd_sum(sumf[row]);
        if (tiisg == 0) {
            dst_f32[first_row + row] = sum_all;
        }
    }
}

template<typename block_t, short qk, short lanes>
kernel void kernel_mul_mv_d2q_f32(
        constant ggml_metal_kargs_mul_mv & args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]]) {
    kernel_mul_mv_d2q_f32_impl<block_t, qk, lanes, N_R0_D2Q, constant ggml_metal_kargs_mul_mv &>(args, src0, src1, dst, nullptr, tgpig, tiisg, sgitg);
}
