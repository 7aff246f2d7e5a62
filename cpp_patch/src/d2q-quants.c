#include "d2q-quants.h"
#include "d2q-blocks.h"
#include "d2q-encode.h"

#include "ggml-impl.h"

#include <assert.h>
#include <string.h>

const char * ggml_d2q_table_sha256(void) {
    return D2Q_TABLE_SHA256;
}

// ---- dequantize ----

#define D2Q_DEQUANTIZE(type)                                                                              \
    void dequantize_row_##type(const block_##type * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) { \
        const int groups = (int) sizeof(x->cb);                                                           \
        assert(k % (D2Q_GROUP*groups) == 0);                                                              \
        for (int64_t i = 0; i < k/(D2Q_GROUP*groups); i++) {                                              \
            const float d = GGML_FP16_TO_FP32(x[i].d);                                                    \
            for (int g = 0; g < groups; g++, y += D2Q_GROUP) {                                            \
                int8_t entries[D2Q_GROUP];                                                                \
                type##_group(&x[i], g, entries);                                                          \
                for (int j = 0; j < D2Q_GROUP; j++) {                                                     \
                    y[j] = d * (float) entries[j];                                                        \
                }                                                                                         \
            }                                                                                             \
        }                                                                                                 \
    }

D2Q_DEQUANTIZE(d2q2)
D2Q_DEQUANTIZE(d2q3)
D2Q_DEQUANTIZE(d2q2_64)
D2Q_DEQUANTIZE(d2q3_64)

// ---- packing: the inverse of d2q-blocks.h ----

static void d2q_pack_pairs(const uint8_t * codes, int groups, uint8_t * qs) {
    for (int k = 0; k < groups; k += 2) {
        for (int i = 0; i < 16; i++) {
            qs[8*k + i] = (uint8_t) (codes[16*k + i] | codes[16*(k + 1) + i] << 4);
        }
    }
}

static void d2q_pack_d2q2   (const d2q_choice * c, block_d2q2    * y) { d2q_pack_pairs(c->codes, 8, y->qs); }
static void d2q_pack_d2q2_64(const d2q_choice * c, block_d2q2_64 * y) { d2q_pack_pairs(c->codes, 2, y->qs); }

static void d2q_pack_d2q3(const d2q_choice * c, block_d2q3 * y) {
    memset(y->qs, 0, sizeof(y->qs));
    memset(y->qh, 0, sizeof(y->qh));
    for (int n = 0; n < 256; n++) {
        const int k = n/32, j = n%32;
        y->qs[32*(k/4) + j] |= (uint8_t) ((c->codes[n] & 3) << d2q3_low_shift(k));
        y->qh[j]            |= (uint8_t) ((c->codes[n] >> 2) << d2q3_high_shift(k));
    }
}

static void d2q_pack_d2q3_64(const d2q_choice * c, block_d2q3_64 * y) {
    memset(y->qs, 0, sizeof(y->qs));
    memset(y->qh, 0, sizeof(y->qh));
    for (int n = 0; n < 64; n++) {
        const int k = n/32, j = n%32;
        y->qs[j%16] |= (uint8_t) ((c->codes[n] & 3) << (4*k + 2*(j/16)));
        y->qh[j%8]  |= (uint8_t) ((c->codes[n] >> 2) << (4*k + j/8));
    }
}

#define D2Q_QUANTIZE(type, paired)                                                                             \
    size_t quantize_##type(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) { \
        block_##type * y = dst;                                                                                \
        const int groups = (int) sizeof(y->cb), block = D2Q_GROUP*groups;                                      \
        assert(n_per_row % block == 0);                                                                        \
        d2q_encode_init();                                                                                     \
        for (int64_t i = 0; i < nrows*n_per_row/block; i++, y++) {                                             \
            const float * w = imatrix ? imatrix + i*block%n_per_row : NULL;                                    \
            const d2q_choice choice = d2q_encode_block(src + i*block, w, groups, paired);                      \
            y->d = GGML_FP32_TO_FP16(choice.d);                                                                \
            memcpy(y->cb, choice.cb, sizeof(y->cb));                                                           \
            d2q_pack_##type(&choice, y);                                                                       \
        }                                                                                                      \
        return (size_t) (nrows*n_per_row/block)*sizeof(*y);                                                    \
    }                                                                                                          \
    void quantize_row_##type##_ref(const float * GGML_RESTRICT x, block_##type * GGML_RESTRICT y, int64_t k) { \
        quantize_##type(x, y, 1, k, NULL);                                                                     \
    }

D2Q_QUANTIZE(d2q2,    true)
D2Q_QUANTIZE(d2q3,    false)
D2Q_QUANTIZE(d2q2_64, true)
D2Q_QUANTIZE(d2q3_64, false)
