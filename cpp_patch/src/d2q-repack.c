// Interleaves rows of the d2q types, for the kernels that multiply eight rows with one column (d2q-repack-x86.c,
// d2q-repack-arm.c).
#include "d2q-repack.h"

bool d2q_can_repack(enum ggml_type type, int64_t n_rows) {
#if defined(D2Q_REPACK)
    return n_rows % D2Q_ROWS == 0 && d2q_is_own(type);
#else
    GGML_UNUSED(type); GGML_UNUSED(n_rows);
    return false;
#endif
}

static void repack_halves(const uint8_t * cb, const uint8_t * qs, int r, bool words, uint8_t (*out_cb)[D2Q_ROWS][4], uint8_t (*out_qs)[D2Q_ROWS][32]) {
    for (int u = 0; u < 2; u++) {
        memcpy(out_cb[u][r], cb + 4*u, 4);
        for (int i = 0; i < 32; i++) {
            out_qs[u][r][words ? 2*(i%16) + i/16 : i] = qs[32*u + i];
        }
    }
}

static void d2q2_interleave(const block_d2q2 * x, int r, block_d2q2x8 * out) {
    out->d[r] = x->d;
    repack_halves(x->cb, x->qs, r, D2Q_PAIR_WORDS, out->cb, out->qs);
}

static void d2q3_interleave(const block_d2q3 * x, int r, block_d2q3x8 * out) {
    out->d[r] = x->d;
    repack_halves(x->cb, x->qs, r, false, out->cb, out->qs);
    memcpy(out->qh[r], x->qh, 32);
}

static void d2q2_64_interleave(const block_d2q2_64 * x, int r, block_d2q2_64x8 * out) {
    out->d[r] = x->d;
    memcpy(out->cb[r], x->cb, 2);
    memcpy(out->qs[r], x->qs, 16);
}

static void d2q3_64_interleave(const block_d2q3_64 * x, int r, block_d2q3_64x8 * out) {
    out->d[r] = x->d;
    memcpy(out->cb[r], x->cb, 2);
    memcpy(out->qs[r], x->qs, 16);
    memcpy(out->qh[r], x->qh, 8);
}

#define D2Q_REPACK_ROWS(type, size)                                                              \
    do {                                                                                         \
        const block_##type * x = rows;                                                           \
        block_##type##x8   * y = out;                                                            \
        const int64_t blocks = n/(size);                                                         \
        for (int64_t row = 0; row < n_rows; row++) {                                             \
            for (int64_t i = 0; i < blocks; i++) {                                               \
                type##_interleave(&x[row*blocks + i], (int) (row%D2Q_ROWS), &y[row/D2Q_ROWS*blocks + i]); \
            }                                                                                    \
        }                                                                                        \
    } while (0)

void d2q_repack(enum ggml_type type, int64_t n, int64_t n_rows, const void * rows, void * out) {
    switch (type) {
        case GGML_TYPE_D2Q2:    D2Q_REPACK_ROWS(d2q2,    QK_K);      break;
        case GGML_TYPE_D2Q3:    D2Q_REPACK_ROWS(d2q3,    QK_K);      break;
        case GGML_TYPE_D2Q2_64: D2Q_REPACK_ROWS(d2q2_64, QK_D2Q_64); break;
        default:                D2Q_REPACK_ROWS(d2q3_64, QK_D2Q_64); break;
    }
}

#if defined(D2Q_REPACK)

typedef void (*gemv_t)(int blocks, const void * x, const void * y, float * result);

void d2q_gemv(enum ggml_type type, int n, const void * rows, int64_t n_rows, const void * column, float * result) {
    static const struct { gemv_t gemv; int weights; size_t size; } kernels[4] = {
        {d2q2_gemv,    QK_K,      sizeof(block_d2q2x8)},    {d2q3_gemv,    QK_K,      sizeof(block_d2q3x8)},
        {d2q2_64_gemv, QK_D2Q_64, sizeof(block_d2q2_64x8)}, {d2q3_64_gemv, QK_D2Q_64, sizeof(block_d2q3_64x8)},
    };
    const int kind = type == GGML_TYPE_D2Q2 ? 0 : type == GGML_TYPE_D2Q3 ? 1 : type == GGML_TYPE_D2Q2_64 ? 2 : 3;
    const int blocks = n/kernels[kind].weights;
    for (int64_t r = 0; r < n_rows; r += D2Q_ROWS) {
        kernels[kind].gemv(blocks, (const char *) rows + (size_t) (r/D2Q_ROWS)*(size_t) blocks*kernels[kind].size, column, result + r);
    }
}

#else

// targets without kernels: never called, because nothing is interleaved
void d2q_repack_init(void) {}

void d2q_gemv(enum ggml_type type, int n, const void * rows, int64_t n_rows, const void * column, float * result) {
    GGML_UNUSED(type); GGML_UNUSED(n); GGML_UNUSED(rows); GGML_UNUSED(n_rows); GGML_UNUSED(column); GGML_UNUSED(result);
}

#endif
