// Checks GGML_OP_MUL_MAT and GGML_OP_MUL_MAT_ID of the CPU backend with d2q weights against sums made here, from one
// column to more than a panel, with broadcast matrices and experts, on several threads, with rows as they are in a file and
// interleaved. test_arm.py links it with ggml for this machine and for ARM. The activations are integers that 8 bits hold
// exactly, so that nothing but float rounding differs.

#include "d2q/d2q-repack.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const enum ggml_type types[] = {GGML_TYPE_D2Q2, GGML_TYPE_D2Q3, GGML_TYPE_D2Q2_64, GGML_TYPE_D2Q3_64};

static uint32_t state = 2463534242u;

static uint32_t next(void) {
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

// the buffer type of interleaved weights, as llama.cpp finds it
static ggml_backend_buffer_type_t repacked_type(void) {
    ggml_backend_dev_t cpu = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    ggml_backend_dev_get_extra_bufts_t list = (ggml_backend_dev_get_extra_bufts_t)
        ggml_backend_reg_get_proc_address(ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * each = list(cpu); *each; each++) {
        if (strcmp(ggml_backend_buft_name(*each), "CPU_D2Q") == 0) { return *each; }
    }
    abort();
}

// the same weights, interleaved
static struct ggml_tensor * new_repacked(struct ggml_context * ctx, const struct ggml_tensor * w, ggml_backend_buffer_t * buffer) {
    ggml_set_no_alloc(ctx, true);
    struct ggml_tensor * t = ggml_new_tensor_3d(ctx, w->type, w->ne[0], w->ne[1], w->ne[2]);
    ggml_set_no_alloc(ctx, false);
    *buffer = ggml_backend_buft_alloc_buffer(repacked_type(), ggml_nbytes(w));
    ggml_backend_tensor_alloc(*buffer, t, ggml_backend_buffer_get_base(*buffer));
    ggml_backend_tensor_set(t, w->data, 0, ggml_nbytes(w));
    return t;
}

// which multiplications llama.cpp may keep such weights for: those whose rows can be interleaved, with activations in float
static int check_supports(void) {
    struct ggml_init_params parameters = { .mem_size = 64u << 10, .mem_buffer = NULL, .no_alloc = true };
    struct ggml_context * ctx = ggml_init(parameters);
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(repacked_type(), 0);
    ggml_backend_dev_t cpu = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    const bool can = d2q_can_repack(GGML_TYPE_D2Q2, 8);
    int bad = 0;
    for (int k = 0; k < 6; k++) {
        const bool id = k == 3 || k == 4;
        struct ggml_tensor * w = ggml_new_tensor_3d(ctx, k == 1 ? GGML_TYPE_Q2_K : GGML_TYPE_D2Q2, 512, k == 2 || k == 4 ? 20 : 24, id ? 4 : 1);
        struct ggml_tensor * x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 512, 2, id ? 3 : 1);
        w->buffer = buffer;
        struct ggml_tensor * op = k == 5 ? ggml_get_rows(ctx, w, ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1))
            : id ? ggml_mul_mat_id(ctx, w, x, ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 3)) : ggml_mul_mat(ctx, w, x);
        if (ggml_backend_dev_supports_op(cpu, op) != (can && (k == 0 || k == 3))) {
            fprintf(stderr, "supports_op, case %d\n", k);
            bad++;
        }
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return bad;
}

// random weights of the type, and what they are as floats
static struct ggml_tensor * new_weights(struct ggml_context * ctx, enum ggml_type type, int n, int rows, int matrices, float * values) {
    struct ggml_tensor * w = ggml_new_tensor_3d(ctx, type, n, rows, matrices);
    uint8_t * data = w->data;
    for (size_t i = 0; i < ggml_nbytes(w); i++) { data[i] = (uint8_t) next(); }
    for (size_t i = 0; i < ggml_nbytes(w); i += ggml_type_size(type)) { // every block begins with its scale
        const uint16_t d = (uint16_t) (0x2000 + next()%0x1000);
        memcpy(data + i, &d, 2);
    }
    ggml_get_type_traits(type)->to_float(w->data, values, ggml_nelements(w));
    return w;
}

static struct ggml_tensor * new_activations(struct ggml_context * ctx, int n, int columns, int matrices) {
    struct ggml_tensor * x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, columns, matrices);
    for (int64_t i = 0; i < ggml_nelements(x); i++) { ((float *) x->data)[i] = i%32 ? (float) (int) (next()%255) - 127 : 127; }
    return x;
}

static int wrong(const char * what, enum ggml_type type, int n, int rows, int columns, const float * w, const float * x, float result) {
    double sum = 0, size = 0;
    for (int i = 0; i < n; i++) {
        sum  += (double) w[i]*x[i];
        size += fabs((double) w[i]*x[i]);
    }
    if (fabs(sum - result) <= 2e-6*size) { return 0; }
    fprintf(stderr, "%s %s, %d weights, %d rows, %d columns: %g instead of %g\n", what, ggml_type_name(type), n, rows, columns, (double) result, sum);
    return 1;
}

static int check(enum ggml_type type, int n, int rows, int columns, int threads, int experts, bool repacked) {
    struct ggml_init_params parameters = { .mem_size = 64u << 20, .mem_buffer = NULL, .no_alloc = false };
    struct ggml_context * ctx = ggml_init(parameters);
    const int matrices = experts ? experts : repacked ? 1 : 2, slots = 2; // interleaved weights of dense layers are one matrix
    float * values = malloc(sizeof(float)*(size_t) n*(size_t) rows*(size_t) matrices);
    struct ggml_tensor * w = new_weights(ctx, type, n, rows, matrices, values), * x, * y, * ids = NULL;
    ggml_backend_buffer_t buffer = NULL;
    if (repacked) { w = new_repacked(ctx, w, &buffer); }
    if (experts) {
        // each column goes to two experts; for odd column numbers both see the same activations
        x   = new_activations(ctx, n, columns%2 ? 1 : slots, columns);
        ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, slots, columns);
        for (int c = 0; c < columns; c++) {
            const int first = (int) (next()%(uint32_t) experts);
            ((int32_t *) ids->data)[2*c]     = first;
            ((int32_t *) ids->data)[2*c + 1] = (first + 1)%experts;
        }
        y = ggml_mul_mat_id(ctx, w, x, ids);
    } else {
        x = new_activations(ctx, n, columns, 2*matrices); // a matrix of weights serves two of activations
        y = ggml_mul_mat(ctx, w, x);
    }
    struct ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);
    if (ggml_graph_compute_with_ctx(ctx, graph, threads) != GGML_STATUS_SUCCESS) { return 1; }
    int bad = 0;
    for (int m = 0; m < y->ne[2]; m++) {
        for (int c = 0; c < y->ne[1]; c++) {
            const int matrix = experts ? ((int32_t *) ids->data)[slots*m + c] : m/2;
            const float * in  = (float *) x->data + ((int64_t) m*x->ne[1] + c%x->ne[1])*n;
            const float * out = (float *) y->data + ((int64_t) m*y->ne[1] + c)*rows;
            for (int r = 0; r < rows && !bad; r++) {
                bad = wrong(experts ? "mul_mat_id" : "mul_mat", type, n, rows, columns, values + ((int64_t) matrix*rows + r)*n, in, out[r]);
            }
        }
    }
    free(values);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return bad;
}

int main(void) {
    static const int columns[] = {1, 2, 4, 5, 9, 70, 150};
    int bad = check_supports(), checks = 0;
    for (size_t t = 0; t < sizeof(types)/sizeof(types[0]); t++) {
        for (size_t c = 0; c < sizeof(columns)/sizeof(columns[0]); c++) {
            for (int experts = 0; experts <= 4; experts += 4) {
                for (int threads = 1; threads <= 3; threads++, checks++) {
                    bad += check(types[t], 512, columns[c] > 64 ? 40 : 150, columns[c], threads, experts, false);
                    if (d2q_can_repack(types[t], 152)) { bad += check(types[t], 512, columns[c] > 64 ? 40 : 152, columns[c], threads, experts, true); }
                }
            }
        }
    }
    printf("%d checks, %d bad\n", checks, bad);
    return bad != 0;
}
