// Times dot products of the d2q types and of stock types, interleaved: for each round and type one line with the
// nanoseconds per dot product, rows in the cache and rows streamed from memory. "_x8" is the kernel for eight rows that were
// interleaved when the model was loaded. bench_kernels.py builds and runs it.
// usage: bench_kernels COLUMNS ROUNDS STREAM_BYTES

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"
#include "ggml-quants.h"
#include "ggml-cpu/quants.h"
#include "d2q/d2q-cpu.h"
#include "d2q/d2q-repack.h"
#include "d2q/d2q-quants.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

// what the sources under test want from the rest of ggml
float ggml_table_f32_f16[1 << 16], ggml_table_f32_e8m0_half[256], ggml_table_f32_ue4m3[256];
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}
void ggml_abort(const char * file, int line, const char * format, ...) {
    (void) format;
    fprintf(stderr, "%s:%d: abort\n", file, line);
    abort();
}

typedef void   (*dot_t)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
typedef size_t (*quantize_t)(const float *, void *, int64_t, int64_t, const float *);

typedef struct {
    const char * name;
    int          id, block, size;
    bool         q8_K;
    dot_t        dot;
    quantize_t   quantize;
    uint8_t    * cached, * streamed;
    bool         x8;
} type_t;

#define K_TYPE(name, id, size)  {#name, id, 256, size, true,  ggml_vec_dot_##name##_q8_K, quantize_##name, NULL, NULL, false}
#define TYPE_0(name, id, b, size) {#name, id, b, size, false, ggml_vec_dot_##name##_q8_0, quantize_##name, NULL, NULL, false}
#define X8(name, id, b, size, q8_K) {#name "_x8", id, b, size, q8_K, NULL, quantize_##name, NULL, NULL, true}
static type_t types[] = {
    K_TYPE(d2q2, 80, 74), K_TYPE(q2_K, 10, 84), K_TYPE(iq2_xs, 17, 74), K_TYPE(iq2_s, 22, 82),
    K_TYPE(d2q3, 81, 106), K_TYPE(q3_K, 11, 110), K_TYPE(iq3_xxs, 18, 98), K_TYPE(q4_K, 12, 144),
    TYPE_0(d2q2_64, 82, 64, 20), TYPE_0(d2q3_64, 83, 64, 28), TYPE_0(q4_0, 2, 32, 18),
    X8(d2q2, 80, 256, 74, true), X8(d2q3, 81, 256, 106, true), X8(d2q2_64, 82, 64, 20, false), X8(d2q3_64, 83, 64, 28, false),
};
#define TYPES ((int) (sizeof(types)/sizeof(types[0])))

static const type_t * by_id(enum ggml_type id) {
    for (int i = 0; i < TYPES; i++) {
        if (types[i].id == (int) id) { return &types[i]; }
    }
    abort();
}
const char * ggml_type_name(enum ggml_type id) { return by_id(id)->name; }
size_t ggml_type_size(enum ggml_type id) { return (size_t) by_id(id)->size; }
size_t ggml_row_size(enum ggml_type id, int64_t n) { return (size_t) (n/by_id(id)->block*by_id(id)->size); }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9*(double) t.tv_nsec;
}

static float gaussian(void) {
    float sum = 0;
    for (int i = 0; i < 12; i++) { sum += (float) rand()/(float) RAND_MAX; }
    return sum - 6;
}

static volatile float sink;

static double time_rows(const type_t * t, int columns, const uint8_t * rows, int n, const void * y) {
    const size_t size = (size_t) (columns/t->block*t->size);
    float sum = 0, s, eight[D2Q_ROWS];
    const double start = now();
    for (int r = 0; t->x8 && r < n; r += D2Q_ROWS) {
        d2q_gemv((enum ggml_type) t->id, columns, rows + (size_t) r*size, D2Q_ROWS, y, eight);
        sum += eight[0];
    }
    for (int r = 0; !t->x8 && r < n; r++) {
        t->dot(columns, &s, 0, rows + (size_t) r*size, 0, y, 0, 1);
        sum += s;
    }
    const double seconds = now() - start;
    sink = sum;
    return seconds/n*1e9;
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s COLUMNS ROUNDS STREAM_BYTES\n", argv[0]);
        return 2;
    }
    const int    columns = atoi(argv[1]), rounds = atoi(argv[2]);
    const size_t stream = strtoull(argv[3], NULL, 10);
    enum { DISTINCT = D2Q_ROWS };
    const int    cached_rows = columns > 8192 ? 64 : 192; // below the size of a second-level cache

    for (int i = 0; i < 1 << 16; i++) { ggml_table_f32_f16[i] = GGML_COMPUTE_FP16_TO_FP32((ggml_fp16_t) i); }
    d2q_cpu_init();
    d2q_repack_init();
    iq2xs_init_impl(GGML_TYPE_IQ2_XS);
    iq2xs_init_impl(GGML_TYPE_IQ2_S);
    iq3xs_init_impl(256);
    float * x = malloc(sizeof(float)*(size_t) columns), * w = malloc(sizeof(float)*(size_t) columns*DISTINCT), * ones = malloc(sizeof(float)*(size_t) columns);
    for (int i = 0; i < columns; i++) { x[i] = gaussian(); ones[i] = 1; }
    for (int i = 0; i < columns*DISTINCT; i++) { w[i] = gaussian()*0.02f; }
    void * y_K = malloc(sizeof(block_q8_K)*(size_t) (columns/256)), * y_0 = malloc(sizeof(block_q8_0)*(size_t) (columns/32));
    quantize_row_q8_K_ref(x, y_K, columns);
    quantize_row_q8_0_ref(x, y_0, columns);

    for (int i = 0; i < TYPES; i++) {
        type_t * t = &types[i];
        const size_t size = ggml_row_size(t->id, columns), n = stream/size/D2Q_ROWS*D2Q_ROWS;
        uint8_t * rows = malloc(size*DISTINCT);
        t->quantize(w, rows, DISTINCT, columns, ones);
        t->cached   = aligned_alloc(64, (size*(size_t) cached_rows + 63)/64*64);
        t->streamed = aligned_alloc(64, (size*n + 63)/64*64);
        for (int r = 0; r < cached_rows; r++) { memcpy(t->cached + (size_t) r*size, rows + (size_t) (r%DISTINCT)*size, size); }
        for (size_t r = 0; r < n; r++) { memcpy(t->streamed + r*size, rows + r%DISTINCT*size, size); }
        if (t->x8) {
            for (int r = 0; r < cached_rows; r += D2Q_ROWS) { d2q_repack(t->id, columns, D2Q_ROWS, rows, t->cached + (size_t) r*size); }
            for (size_t r = 0; r < n; r += D2Q_ROWS) { memcpy(t->streamed + r*size, t->cached, size*D2Q_ROWS); }
        }
        free(rows);
    }
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < TYPES; i++) {
            const type_t * t = &types[i];
            const void * y = t->q8_K ? y_K : y_0;
            time_rows(t, columns, t->cached, cached_rows, y); // warms the cache
            double cached = INFINITY;
            for (int repeat = 0; repeat < 3; repeat++) { cached = MIN(cached, time_rows(t, columns, t->cached, cached_rows, y)); }
            const double streamed = time_rows(t, columns, t->streamed, (int) (stream/ggml_row_size(t->id, columns)/D2Q_ROWS*D2Q_ROWS), y);
            printf("%s %.3f %.3f\n", t->name, cached, streamed);
        }
    }
    return 0;
}
