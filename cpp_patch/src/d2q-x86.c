// Dot products of the d2q types for x86: AVX2, with AVX512-VNNI (256 bits wide) or AVX-VNNI where the target has it.
#include "d2q-x86.h"

#if defined(D2Q_X86)

#include "d2q-blocks.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <assert.h>

D2Q_TABLE_ALIGN uint8_t d2q_pair_table_u7[256][32];
D2Q_TABLE_ALIGN uint8_t d2q_scalar_table_u7[256][16];
D2Q_TABLE_ALIGN int8_t  d2q_scalar_table_s8[256][16];

void d2q_cpu_init(void) {
    for (int b = 0; b < 256; b++) {
        for (int i = 0; i < 32; i++) { d2q_pair_table_u7[b][i]   = (uint8_t) (d2q_pair_table[b][i/16][i%16] + 64); }
        for (int i = 0; i < 16; i++) {
            d2q_scalar_table_s8[b][i] = d2q_scalar_table[b][d2q_canonical_index(i)];
            d2q_scalar_table_u7[b][i] = (uint8_t) (d2q_scalar_table_s8[b][i] + 64);
        }
    }
}

static inline float d2q_sum(__m256 v) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

// Entries times activations of Q8_0, which has no sums to correct an offset with. Where the multiply-add is one instruction,
// the sign moves from the entries to the activations. Where it is several, the correction is cheaper: in 16 bits, halfway
// to the sum, where two products of an entry are at most 2*64*128.
#if defined(D2Q_DPBUSD)

#define D2Q_PAIRS_Q8_0   d2q_pair_table
#define D2Q_SCALARS_Q8_0 d2q_scalar_table_s8

static inline __m256i d2q_dot_q8_0(__m256i w, const int8_t * q8) {
    return d2q_dot_add(_mm256_setzero_si256(), _mm256_sign_epi8(w, w), _mm256_sign_epi8(d2q_load(q8), w));
}

#else

#define D2Q_PAIRS_Q8_0   d2q_pair_table_u7
#define D2Q_SCALARS_Q8_0 d2q_scalar_table_u7

static inline __m256i d2q_dot_q8_0(__m256i u, const int8_t * q8) {
    const __m256i offset = _mm256_maddubs_epi16(_mm256_set1_epi8(64), d2q_load(q8));
    return _mm256_madd_epi16(_mm256_sub_epi16(_mm256_maddubs_epi16(u, d2q_load(q8)), offset), _mm256_set1_epi16(1));
}

#endif

// acc + d*(p0*y[0].d + p1*y[1].d): each scale comes from memory into all lanes, which is cheaper than their products would be
static inline __m256 d2q_add_block(__m256 acc, ggml_half d, __m256i p0, __m256i p1, const block_q8_0 * y) {
    __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(p0), _mm256_set1_ps(GGML_CPU_FP16_TO_FP32(y[0].d)));
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(p1), _mm256_set1_ps(GGML_CPU_FP16_TO_FP32(y[1].d)), sum);
    return _mm256_fmadd_ps(sum, _mm256_set1_ps(GGML_CPU_FP16_TO_FP32(d)), acc);
}

// what corrects the offset of 64 in the table: -64 times the activations, from their sums of 16
static inline __m256i d2q_offset(const block_q8_K * y) {
    return _mm256_madd_epi16(d2q_load(y->bsums), _mm256_set1_epi16(-64));
}

D2Q_VEC_DOT(ggml_vec_dot_d2q2_q8_K) {
    assert(n % QK_K == 0 && nrc == 1);
    GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);
    const block_d2q2 * GGML_RESTRICT x = vx;
    const block_q8_K * GGML_RESTRICT y = vy;
    const __m256i nibble = _mm256_set1_epi8(15);

    __m256 acc = _mm256_setzero_ps();
    for (const block_d2q2 * end = x + n/QK_K; x < end; x++, y++) {
        __m256i even = d2q_offset(y), odd = _mm256_setzero_si256();
        for (int t = 0; t < 4; t++) {
            // the same 16 codes in both lanes: the low lane looks up first components, the high lane second ones
            const __m256i q  = d2q_load_both(x->qs + 16*t);
            const __m256i w0 = _mm256_shuffle_epi8(d2q_load(d2q_pair_table_u7[x->cb[2*t]]),     _mm256_and_si256(q, nibble));
            const __m256i w1 = _mm256_shuffle_epi8(d2q_load(d2q_pair_table_u7[x->cb[2*t + 1]]), _mm256_and_si256(_mm256_srli_epi16(q, 4), nibble));
            even = d2q_dot_add(even, w0, d2q_load(y->qs + 64*t));
            odd  = d2q_dot_add(odd,  w1, d2q_load(y->qs + 64*t + 32));
        }
        acc = _mm256_fmadd_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(x->d)*y->d), _mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)), acc);
    }
    *s = d2q_sum(acc);
}

D2Q_VEC_DOT(ggml_vec_dot_d2q3_q8_K) {
    assert(n % QK_K == 0 && nrc == 1);
    GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);
    const block_d2q3 * GGML_RESTRICT x = vx;
    const block_q8_K * GGML_RESTRICT y = vy;

    __m256 acc = _mm256_setzero_ps();
    for (const block_d2q3 * end = x + n/QK_K; x < end; x++, y++) {
        const __m256i qh = d2q_load(x->qh);
        __m256i sum0 = d2q_offset(y), sum1 = _mm256_setzero_si256();
#define D2Q_STEP(sum, k, indices) \
        sum = d2q_dot_add(sum, d2q_lookup(d2q_load_both(d2q_scalar_table_u7[x->cb[k]]), indices), d2q_load(y->qs + 32*(k)))
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256i even, odd;
            d2q3_indices(x->qs + 32*half, half ? qh : _mm256_add_epi8(qh, qh), &even, &odd);
            D2Q_STEP(sum0, 4*half,     even);
            D2Q_STEP(sum1, 4*half + 1, odd);
            D2Q_STEP(sum0, 4*half + 2, _mm256_srli_epi16(even, 4));
            D2Q_STEP(sum1, 4*half + 3, _mm256_srli_epi16(odd, 4));
        }
#undef D2Q_STEP
        acc = _mm256_fmadd_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(x->d)*y->d), _mm256_cvtepi32_ps(_mm256_add_epi32(sum0, sum1)), acc);
    }
    *s = d2q_sum(acc);
}

D2Q_VEC_DOT(ggml_vec_dot_d2q2_64_q8_0) {
    assert(n % QK_D2Q_64 == 0 && nrc == 1);
    GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);
    const block_d2q2_64 * GGML_RESTRICT x = vx;
    const block_q8_0    * GGML_RESTRICT y = vy;
    const __m256i nibble = _mm256_set1_epi8(15);

    __m256 acc = _mm256_setzero_ps();
    for (const block_d2q2_64 * end = x + n/QK_D2Q_64; x < end; x++, y += 2) {
        const __m256i q  = d2q_load_both(x->qs);
        const __m256i w0 = _mm256_shuffle_epi8(d2q_load(D2Q_PAIRS_Q8_0[x->cb[0]]), _mm256_and_si256(q, nibble));
        const __m256i w1 = _mm256_shuffle_epi8(d2q_load(D2Q_PAIRS_Q8_0[x->cb[1]]), _mm256_and_si256(_mm256_srli_epi16(q, 4), nibble));
        const __m256i p0 = d2q_dot_q8_0(w0, y[0].qs), p1 = d2q_dot_q8_0(w1, y[1].qs);
        acc = d2q_add_block(acc, x->d, p0, p1, y);
    }
    *s = d2q_sum(acc);
}

D2Q_VEC_DOT(ggml_vec_dot_d2q3_64_q8_0) {
    assert(n % QK_D2Q_64 == 0 && nrc == 1);
    GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);
    const block_d2q3_64 * GGML_RESTRICT x = vx;
    const block_q8_0    * GGML_RESTRICT y = vy;

    __m256 acc = _mm256_setzero_ps();
    for (const block_d2q3_64 * end = x + n/QK_D2Q_64; x < end; x++, y += 2) {
        const __m256i c0 = d2q3_64_indices(x->qs, x->qh);
        const __m256i c1 = _mm256_srli_epi16(c0, 4);
        const __m256i w0 = d2q_lookup(d2q_load_both(D2Q_SCALARS_Q8_0[x->cb[0]]), c0);
        const __m256i w1 = d2q_lookup(d2q_load_both(D2Q_SCALARS_Q8_0[x->cb[1]]), c1);
        const __m256i p0 = d2q_dot_q8_0(w0, y[0].qs), p1 = d2q_dot_q8_0(w1, y[1].qs);
        acc = d2q_add_block(acc, x->d, p0, p1, y);
    }
    *s = d2q_sum(acc);
}

#endif
