// Where ggml's matrix multiplications treat the d2q types their own way: the size of the shares that threads take one after
// the other, and from such a share to d2q_gemm, or to d2q_gemv for interleaved rows.
#include "d2q-repack.h"

#include "ggml-cpu.h"

#include <assert.h>

bool d2q_has_gemm(enum ggml_type type) {
#if defined(D2Q_GEMM)
    return d2q_is_own(type);
#else
    GGML_UNUSED(type);
    return false;
#endif
}

int d2q_chunk_size(enum ggml_type type, int64_t n_rows, int64_t n_columns, int n_threads, int stock) {
    if (d2q_is_own(type) && (n_rows == 1 || n_columns == 1)) {
        const int64_t all = n_rows > n_columns ? n_rows : n_columns, shares = 4*(int64_t) n_threads;
        const int size = (int) ((all + shares - 1)/shares);
        return size > stock ? size : stock;
    }
    return d2q_has_gemm(type) ? D2Q_GEMM_PANEL : stock;
}

#if defined(D2Q_REPACK)

// how the columns of activations lie in wdata, see ggml_compute_forward_mul_mat_one_chunk
typedef struct {
    size_t nb[3]; // bytes to the next column, matrix, group of matrices
} layout_t;

static layout_t activations_layout(const struct ggml_tensor * src0, const struct ggml_tensor * src1) {
    const enum ggml_type type = ggml_get_type_traits_cpu(src0->type)->vec_dot_type;
    layout_t layout = {{src1->nb[1], src1->nb[2], src1->nb[3]}};
    if (src1->type != type || ggml_is_contiguous(src1)) {
        layout.nb[0] = ggml_row_size(type, src1->ne[0]);
        layout.nb[1] = layout.nb[0]*(size_t) src1->ne[1];
        layout.nb[2] = layout.nb[1]*(size_t) src1->ne[2];
    }
    return layout;
}

static int64_t whole_blocks(int64_t row) {
    return (row + D2Q_ROWS - 1)/D2Q_ROWS*D2Q_ROWS;
}

// Whether this share of a multiplication is done here. Of interleaved rows eight can't be divided: both ends move on to a
// multiple of eight, so that all shares together are still all rows.
static bool take_share(const struct ggml_tensor * src0, int64_t * first, int64_t * last, int64_t n_columns) {
    if (d2q_is_repacked(src0)) {
        *first = whole_blocks(*first);
        *last  = whole_blocks(*last);
        return true;
    }
    return d2q_has_gemm(src0->type) && n_columns >= D2Q_GEMM_MIN_COLUMNS;
}

// n_rows rows of src0 from `rows` on, times at most D2Q_GEMM_PANEL columns
static void multiply(const struct ggml_tensor * src0, const void * rows, int64_t n_rows, const void * const * columns, float * const * results, int n_columns) {
    const bool repacked = d2q_is_repacked(src0);
#if defined(D2Q_GEMM)
    if (!repacked || n_columns >= D2Q_GEMM_MIN_COLUMNS) {
        d2q_gemm(src0->type, (int) src0->ne[0], rows, src0->nb[1], repacked, n_rows, columns, results, n_columns);
        return;
    }
#endif
    assert(repacked);
    for (int c = 0; c < n_columns; c++) {
        d2q_gemv(src0->type, (int) src0->ne[0], rows, n_rows, columns[c], results[c]);
    }
}

bool d2q_mul_mat_chunk(const struct ggml_tensor * dst, const void * wdata, int64_t ir0_start, int64_t ir0_end, int64_t ir1_start, int64_t ir1_end) {
    const struct ggml_tensor * src0 = dst->src[0], * src1 = dst->src[1];
    if (!take_share(src0, &ir0_start, &ir0_end, ir1_end - ir1_start)) {
        return false;
    }
    const layout_t layout = activations_layout(src0, src1);
    for (int64_t ir1 = ir1_start, next; ir1 < ir1_end; ir1 = next) {
        const int64_t matrix = ir1/dst->ne[1], i2 = matrix%dst->ne[2], i3 = matrix/dst->ne[2];
        next = (matrix + 1)*dst->ne[1];
        next = next < ir1_end ? next : ir1_end;
        next = next < ir1 + D2Q_GEMM_PANEL ? next : ir1 + D2Q_GEMM_PANEL;

        // a matrix of weights may serve several matrices of activations
        const int64_t i02 = i2/(dst->ne[2]/src0->ne[2]), i03 = i3/(dst->ne[3]/src0->ne[3]);
        const char * rows = (const char *) src0->data + i02*src0->nb[2] + i03*src0->nb[3] + ir0_start*src0->nb[1];
        const void * columns[D2Q_GEMM_PANEL];
        float      * results[D2Q_GEMM_PANEL];
        for (int64_t c = ir1; c < next; c++) {
            const int64_t i1 = c - matrix*dst->ne[1];
            columns[c - ir1] = (const char *) wdata + i1*layout.nb[0] + i2*layout.nb[1] + i3*layout.nb[2];
            results[c - ir1] = (float *) ((char *) dst->data + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]) + ir0_start;
        }
        multiply(src0, rows, ir0_end - ir0_start, columns, results, (int) (next - ir1));
    }
    return true;
}

bool d2q_mul_mat_id_chunk(const struct ggml_tensor * dst, const void * matrix, const int32_t (*mapping)[2], const void * wdata,
                          int64_t ir0_start, int64_t ir0_end, int64_t ir1_start, int64_t ir1_end) {
    const struct ggml_tensor * src0 = dst->src[0], * src1 = dst->src[1];
    if (!take_share(src0, &ir0_start, &ir0_end, ir1_end - ir1_start)) {
        return false;
    }
    const layout_t layout = activations_layout(src0, src1);
    const char * rows = (const char *) matrix + ir0_start*src0->nb[1];
    for (int64_t ir1 = ir1_start; ir1 < ir1_end; ir1 += D2Q_GEMM_PANEL) {
        const void * columns[D2Q_GEMM_PANEL];
        float      * results[D2Q_GEMM_PANEL];
        int n = 0;
        for (int64_t c = ir1; c < ir1_end && n < D2Q_GEMM_PANEL; c++, n++) {
            const int64_t slot = mapping[c][0], row = mapping[c][1];
            columns[n] = (const char *) wdata + (slot%src1->ne[1])*layout.nb[0] + row*layout.nb[1];
            results[n] = (float *) ((char *) dst->data + slot*dst->nb[1] + row*dst->nb[2]) + ir0_start;
        }
        multiply(src0, rows, ir0_end - ir0_start, columns, results, n);
    }
    return true;
}

#else

bool d2q_mul_mat_chunk(const struct ggml_tensor * dst, const void * wdata, int64_t ir0_start, int64_t ir0_end, int64_t ir1_start, int64_t ir1_end) {
    GGML_UNUSED(dst); GGML_UNUSED(wdata); GGML_UNUSED(ir0_start); GGML_UNUSED(ir0_end); GGML_UNUSED(ir1_start); GGML_UNUSED(ir1_end);
    return false;
}

bool d2q_mul_mat_id_chunk(const struct ggml_tensor * dst, const void * matrix, const int32_t (*mapping)[2], const void * wdata,
                          int64_t ir0_start, int64_t ir0_end, int64_t ir1_start, int64_t ir1_end) {
    GGML_UNUSED(dst); GGML_UNUSED(matrix); GGML_UNUSED(mapping); GGML_UNUSED(wdata);
    GGML_UNUSED(ir0_start); GGML_UNUSED(ir0_end); GGML_UNUSED(ir1_start); GGML_UNUSED(ir1_end);
    return false;
}

#endif
