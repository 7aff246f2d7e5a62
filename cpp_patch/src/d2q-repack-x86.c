// Eight interleaved rows of the d2q types times one column, for x86. The order of the loops is what makes them fast: four
// groups of one half of a block, then all eight rows with them, so that activations stay in registers and the code small.
// 256 bits wide on every target: Zen 4 executes a shuffle of 512 bits in two cycles, and building a table of 512 bits from
// two codebooks takes another shuffle.
#include "d2q-repack.h"
#include "d2q-x86.h"

#if defined(D2Q_X86)

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#if D2Q_PAIR_WORDS
// both components of a pair side by side in a word, and a scalar codebook as often as it fits: the look-ups of these sizes
// have their tables in memory, and other bits of an index than the code's then do no harm
D2Q_TABLE_ALIGN static uint16_t pair_words[256][16];
D2Q_TABLE_ALIGN static uint8_t  scalars[256][32];
#endif

void d2q_repack_init(void) {
#if D2Q_PAIR_WORDS
    for (int b = 0; b < 256; b++) {
        for (int i = 0; i < 16; i++) {
            pair_words[b][i] = (uint16_t) ((d2q_pair_table[b][0][i] + 64) | (d2q_pair_table[b][1][i] + 64) << 8);
        }
        for (int i = 0; i < 32; i++) { scalars[b][i] = (uint8_t) (d2q_scalar_table[b][d2q_canonical_index(i%16)] + 64); }
    }
#endif
}

// entries of a scalar codebook for indices in the low nibbles
static inline __m256i scalar_entries(uint8_t cb, __m256i index) {
#if D2Q_PAIR_WORDS
    return _mm256_permutexvar_epi8(index, _mm256_load_si256((const __m256i *) scalars[cb]));
#else
    return d2q_lookup(d2q_load_both(d2q_scalar_table_u7[cb]), index);
#endif
}

// entries of a codebook of pairs for codes in the low nibbles of 16 bytes, twice
static inline __m256i pair_entries(uint8_t cb, __m256i index) {
    return _mm256_shuffle_epi8(_mm256_load_si256((const __m256i *) d2q_pair_table_u7[cb]), _mm256_and_si256(index, _mm256_set1_epi8(15)));
}

// ---- the weights of four groups of one row, 64 added, and activations in their order ----

static inline void d2q2_decode(const block_d2q2x8 * x, int u, int r, __m256i * w) {
    const uint8_t * cb = x->cb[u][r];
#if D2Q_PAIR_WORDS
    const __m256i q = d2q_load(x->qs[u][r]);
    w[0] = _mm256_permutexvar_epi16(q,                        _mm256_load_si256((const __m256i *) pair_words[cb[0]]));
    w[1] = _mm256_permutexvar_epi16(_mm256_srli_epi16(q, 4),  _mm256_load_si256((const __m256i *) pair_words[cb[1]]));
    w[2] = _mm256_permutexvar_epi16(_mm256_srli_epi16(q, 8),  _mm256_load_si256((const __m256i *) pair_words[cb[2]]));
    w[3] = _mm256_permutexvar_epi16(_mm256_srli_epi16(q, 12), _mm256_load_si256((const __m256i *) pair_words[cb[3]]));
#else
    const __m256i q0 = d2q_load_both(x->qs[u][r]), q1 = d2q_load_both(x->qs[u][r] + 16);
    w[0] = pair_entries(cb[0], q0);
    w[1] = pair_entries(cb[1], _mm256_srli_epi16(q0, 4));
    w[2] = pair_entries(cb[2], q1);
    w[3] = pair_entries(cb[3], _mm256_srli_epi16(q1, 4));
#endif
}

static inline __m256i d2q2_activations(const int8_t * q8) {
#if D2Q_PAIR_WORDS
    // (0, 16), (1, 17), ...: the middle quarters change places, then the two quarters of each lane are interleaved
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    return _mm256_shuffle_epi8(_mm256_permute4x64_epi64(d2q_load(q8), 0xD8), order);
#else
    return d2q_load(q8);
#endif
}

static inline void d2q3_decode(const block_d2q3x8 * x, int u, int r, __m256i * w) {
    const uint8_t * cb = x->cb[u][r];
    __m256i even, odd;
    d2q3_indices(x->qs[u][r], _mm256_sll_epi16(d2q_load(x->qh[r]), _mm_cvtsi32_si128(1 - u)), &even, &odd);
    w[0] = scalar_entries(cb[0], even);
    w[1] = scalar_entries(cb[1], odd);
    w[2] = scalar_entries(cb[2], _mm256_srli_epi16(even, 4));
    w[3] = scalar_entries(cb[3], _mm256_srli_epi16(odd, 4));
}

static inline __m256i d2q3_activations(const int8_t * q8) {
    return d2q_load(q8);
}

// blocks of 64: two groups
static inline void d2q2_64_decode(const block_d2q2_64x8 * x, int r, __m256i * w) {
    const __m256i q = d2q_load_both(x->qs[r]);
    w[0] = pair_entries(x->cb[r][0], q);
    w[1] = pair_entries(x->cb[r][1], _mm256_srli_epi16(q, 4));
}

static inline void d2q3_64_decode(const block_d2q3_64x8 * x, int r, __m256i * w) {
    const __m256i index = d2q3_64_indices(x->qs[r], x->qh[r]);
    w[0] = scalar_entries(x->cb[r][0], index);
    w[1] = scalar_entries(x->cb[r][1], _mm256_srli_epi16(index, 4));
}

// ---- eight rows ----

// the eight vectors' sums
static inline __m256 sums(const __m256 * v) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

static inline void store_scales(const ggml_half * d, float activations, float * out) {
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d)), _mm256_set1_ps(activations)));
}

// what the offset of 64 in the tables adds, negative, spread over the lanes: every row's sum begins with it
static inline __m256i d2q_offset_q8_K(const block_q8_K * y) {
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(_mm256_madd_epi16(d2q_load(y->bsums), _mm256_set1_epi16(1)), 6));
}

static inline __m256i d2q_offset_q8_0(__m256i q8) {
    return _mm256_sub_epi32(_mm256_setzero_si256(), d2q_dot_add(_mm256_setzero_si256(), _mm256_set1_epi8(64), q8));
}

#define D2Q_GEMV_Q8_K(type)                                                                                       \
    D2Q_GEMV(type##_gemv) {                                                                                           \
        const block_##type##x8 * GGML_RESTRICT x = vx;                                                            \
        const block_q8_K       * GGML_RESTRICT y = vy;                                                            \
        __m256 acc[D2Q_ROWS];                                                                                     \
        for (int r = 0; r < D2Q_ROWS; r++) { acc[r] = _mm256_setzero_ps(); }                                      \
        for (int i = 0; i < blocks; i++) {                                                                        \
            const __m256i offset = d2q_offset_q8_K(&y[i]);                                                        \
            __m256i sum[D2Q_ROWS];                                                                                \
            for (int r = 0; r < D2Q_ROWS; r++) { sum[r] = offset; }                                               \
            for (int u = 0; u < 2; u++) {                                                                         \
                const int8_t * q8 = y[i].qs + 128*u;                                                              \
                const __m256i y0 = type##_activations(q8),      y1 = type##_activations(q8 + 32);                 \
                const __m256i y2 = type##_activations(q8 + 64), y3 = type##_activations(q8 + 96);                 \
                _Pragma("GCC unroll 8")                                                                           \
                for (int r = 0; r < D2Q_ROWS; r++) {                                                              \
                    __m256i w[4];                                                                                 \
                    type##_decode(&x[i], u, r, w);                                                                \
                    sum[r] = d2q_dot_add(d2q_dot_add(sum[r], w[0], y0), w[1], y1);                                \
                    sum[r] = d2q_dot_add(d2q_dot_add(sum[r], w[2], y2), w[3], y3);                                \
                }                                                                                                 \
            }                                                                                                     \
            float scales[D2Q_ROWS];                                                                               \
            store_scales(x[i].d, y[i].d, scales);                                                                 \
            for (int r = 0; r < D2Q_ROWS; r++) {                                                                  \
                acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(scales[r]), _mm256_cvtepi32_ps(sum[r]), acc[r]);          \
            }                                                                                                     \
        }                                                                                                         \
        _mm256_storeu_ps(result, sums(acc));                                                                      \
    }

#define D2Q_GEMV_Q8_0(type)                                                                                       \
    D2Q_GEMV(type##_gemv) {                                                                                           \
        const block_##type##x8 * GGML_RESTRICT x = vx;                                                            \
        const block_q8_0       * GGML_RESTRICT y = vy;                                                            \
        __m256 acc[D2Q_ROWS];                                                                                     \
        for (int r = 0; r < D2Q_ROWS; r++) { acc[r] = _mm256_setzero_ps(); }                                      \
        for (int i = 0; i < blocks; i++, y += 2) {                                                                \
            const __m256i y0 = d2q_load(y[0].qs), y1 = d2q_load(y[1].qs);                                         \
            const __m256i offset0 = d2q_offset_q8_0(y0), offset1 = d2q_offset_q8_0(y1);                           \
            float scales[2][D2Q_ROWS];                                                                            \
            store_scales(x[i].d, GGML_CPU_FP16_TO_FP32(y[0].d), scales[0]);                                       \
            store_scales(x[i].d, GGML_CPU_FP16_TO_FP32(y[1].d), scales[1]);                                       \
            _Pragma("GCC unroll 8")                                                                               \
            for (int r = 0; r < D2Q_ROWS; r++) {                                                                  \
                __m256i w[2];                                                                                     \
                type##_decode(&x[i], r, w);                                                                       \
                const __m256i p0 = d2q_dot_add(offset0, w[0], y0), p1 = d2q_dot_add(offset1, w[1], y1);           \
                acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(scales[0][r]), _mm256_cvtepi32_ps(p0), acc[r]);           \
                acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(scales[1][r]), _mm256_cvtepi32_ps(p1), acc[r]);           \
            }                                                                                                     \
        }                                                                                                         \
        _mm256_storeu_ps(result, sums(acc));                                                                      \
    }

D2Q_GEMV_Q8_K(d2q2)
D2Q_GEMV_Q8_K(d2q3)
D2Q_GEMV_Q8_0(d2q2_64)
D2Q_GEMV_Q8_0(d2q3_64)

#endif
