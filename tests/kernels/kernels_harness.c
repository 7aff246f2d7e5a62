// Checks the kernels of d2q-*.c as this compiler target has them, on rows that end where their memory ends: the dot
// products, the quantizer of activations, eight interleaved rows times a column, and the matrix multiplication where the
// target has one. test_sources.py compiles it with the kernels' own sources for several targets, also under sanitizers. Two
// references: sums of integers made here from d2q-blocks.h, which must come out exactly where all scales are +-1, and the
// portable dot products for everything else.

#include "d2q/d2q-blocks.h"
#include "d2q/d2q-cpu.h"
#include "d2q/d2q-repack.h"
#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// what ggml defines elsewhere and the sources under test refer to
float ggml_table_f32_f16[1 << 16];
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}
const struct ggml_type_traits_cpu * ggml_get_type_traits_cpu(enum ggml_type type) { (void) type; abort(); }
size_t ggml_row_size(enum ggml_type type, int64_t n) { (void) type; (void) n; abort(); }
bool ggml_is_contiguous(const struct ggml_tensor * tensor) { (void) tensor; abort(); }
#if !defined(D2Q_X86) && !defined(D2Q_ARM)
void quantize_row_q8_K(const float * x, void * y, int64_t k) { (void) x; (void) y; (void) k; abort(); }
#endif

typedef void (*dot_t)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
typedef void (*group_t)(const uint8_t *, int, int8_t *);

typedef struct {
    const char *   name;
    enum ggml_type id;
    int            block, size;
    dot_t          fast, generic;
    group_t        group; // the 32 entries of one group of a block
} type_t;

#define GROUP(type) \
    static void group_##type(const uint8_t * x, int k, int8_t * out) { type##_group((const block_##type *) x, k, out); }
GROUP(d2q2) GROUP(d2q3) GROUP(d2q2_64) GROUP(d2q3_64)

#define TYPE(type, id, block, partner) \
    {#type, id, block, sizeof(block_##type), ggml_vec_dot_##type##_##partner, ggml_vec_dot_##type##_##partner##_generic, group_##type}
static const type_t types[] = {
    TYPE(d2q2,    GGML_TYPE_D2Q2,    256, q8_K),
    TYPE(d2q3,    GGML_TYPE_D2Q3,    256, q8_K),
    TYPE(d2q2_64, GGML_TYPE_D2Q2_64, 64,  q8_0),
    TYPE(d2q3_64, GGML_TYPE_D2Q3_64, 64,  q8_0),
};

// what the rows and columns contain
enum { RANDOM, LARGEST, SMALLEST, ALTERNATING, ALL_ONES, EXTREME_SCALES, UNIT_SCALES, UNIT_LARGEST, UNIT_SMALLEST, STYLES };
static const uint16_t EXTREME[] = {0, 0x8000, 1, 0x8001, 0x3FF, 0x83FF, 0x400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF};
enum { EXTREMES = sizeof(EXTREME)/sizeof(EXTREME[0]) };

static uint64_t state = 88172645463325252ull;

static uint32_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t) (state >> 16);
}

// memory whose last byte is the last of its page; what follows can't be read, nor, one page down, what precedes
typedef struct { uint8_t * map, * start; size_t bytes; } guarded;

static guarded guard(size_t size) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), body = (size + page - 1)/page*page;
    guarded g = { .bytes = body + 2*page };
    g.map = mmap(NULL, g.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect(g.map, page, PROT_NONE) || mprotect(g.map + page + body, page, PROT_NONE)) {
        perror("mmap");
        exit(2);
    }
    g.start = g.map + page + body - size;
    return g;
}

static ggml_half half(uint16_t bits) {
    ggml_half h;
    memcpy(&h, &bits, 2);
    return h;
}

static bool unit(int style) { return style >= UNIT_SCALES; }

static ggml_half scale(int style) {
    return half(unit(style) ? (uint16_t) (0x3C00 + (next()%2 << 15)) : style == EXTREME_SCALES ? EXTREME[next()%EXTREMES]
        : (uint16_t) (0x2000 + next()%0x1000 + (next()%2 << 15)));
}

static size_t row_bytes(const type_t * t, int blocks) { return (size_t) blocks*(size_t) t->size; }
static size_t column_bytes(const type_t * t, int blocks) { return (size_t) blocks*(t->block == 256 ? sizeof(block_q8_K) : 2*sizeof(block_q8_0)); }

static void fill_row(const type_t * t, int blocks, int style, uint8_t * x) {
    for (size_t i = 0; i < row_bytes(t, blocks); i++) { x[i] = style == ALL_ONES ? 0xFF : (uint8_t) next(); }
    for (int i = 0; i < blocks; i++) {
        const ggml_half d = scale(style);
        memcpy(x + i*t->size, &d, 2);
        // a codebook with the largest or the smallest entry, and its code everywhere
        if (style == UNIT_LARGEST || style == UNIT_SMALLEST) {
            int8_t entries[D2Q_GROUP];
            int best = 0, best_book = 0, best_code = 0;
            for (int book = 0; book < 256; book++) {
                x[i*t->size + 2] = (uint8_t) book;
                for (int code = 0; code < 256; code += 17) { // the same nibble twice; for scalars, also the high bit on or off
                    memset(x + i*t->size + 2 + t->block/32, code, (size_t) (t->size - 2 - t->block/32));
                    t->group(x + i*t->size, 0, entries);
                    int sum = 0;
                    for (int j = 0; j < D2Q_GROUP; j++) { sum += style == UNIT_LARGEST ? entries[j] : -entries[j]; }
                    if (sum > best) { best = sum; best_book = book; best_code = code; }
                }
            }
            memset(x + i*t->size + 2, best_book, (size_t) t->block/32);
            memset(x + i*t->size + 2 + t->block/32, best_code, (size_t) (t->size - 2 - t->block/32));
        }
    }
}

static int activation(const type_t * t, int style, int j) {
    switch (style) {
        case LARGEST: case ALL_ONES: case UNIT_LARGEST: return 127;
        case SMALLEST: return -127;
        case UNIT_SMALLEST: return t->block == 256 ? -128 : -127; // ggml makes none below -127, and on x86 a sign can't move to -128
        case ALTERNATING: return j%2 ? 127 : -127;
        default: return (int) (next()%255) - 127;
    }
}

static void fill_column(const type_t * t, int blocks, int style, uint8_t * y) {
    for (int j = 0; j < blocks*t->block; j++) {
        const int q = activation(t, style, j);
        if (t->block == 256) {
            block_q8_K * b = (block_q8_K *) y + j/256;
            if (j%256 == 0) {
                memset(b, 0, sizeof(*b));
                b->d = unit(style) ? (next()%2 ? 1.0f : -1.0f) : 0.01f*(float) (1 + next()%100);
            }
            b->qs[j%256] = (int8_t) q;
            b->bsums[j%256/16] = (int16_t) (b->bsums[j%256/16] + q);
        } else {
            block_q8_0 * b = (block_q8_0 *) y + j/32;
            b->d = j%32 ? b->d : unit(style) ? half((uint16_t) (0x3C00 + (next()%2 << 15))) : half((uint16_t) (0x2000 + next()%0x1000));
            b->qs[j%32] = (int8_t) q;
        }
    }
}

static double activation_scale(const type_t * t, const uint8_t * y, int j) {
    return t->block == 256 ? (double) ((const block_q8_K *) y)[j/256].d : (double) GGML_CPU_FP16_TO_FP32(((const block_q8_0 *) y)[j/32].d);
}

// the exact dot product, and what its terms add up to without their signs
static double reference(const type_t * t, int blocks, const uint8_t * x, const uint8_t * y, double * size) {
    double total = 0;
    *size = 0;
    for (int i = 0; i < blocks; i++) {
        ggml_half h;
        memcpy(&h, x + i*t->size, 2);
        for (int k = 0; k < t->block/32; k++) {
            int8_t entries[D2Q_GROUP];
            t->group(x + i*t->size, k, entries);
            int64_t sum = 0, magnitude = 0;
            const int first = i*t->block + 32*k;
            for (int j = 0; j < D2Q_GROUP; j++) {
                const int q = t->block == 256 ? ((const block_q8_K *) y)[i].qs[32*k + j] : ((const block_q8_0 *) y)[first/32].qs[j];
                sum += entries[j]*q;
                magnitude += abs(entries[j]*q);
            }
            const double d = (double) GGML_CPU_FP16_TO_FP32(h)*activation_scale(t, y, first);
            total += d*(double) sum;
            *size += fabs(d)*(double) magnitude;
        }
    }
    return total;
}

// sums of integers below 2^24 are exact in float, in any order
static bool agrees(float value, double exact, double size, int style) {
    return unit(style) && size < 1 << 24 ? (double) value == exact : fabs((double) value - exact) <= 1e-6*size;
}

static int check_dot(const type_t * t, int blocks, int style) {
    const size_t row = row_bytes(t, blocks), column = column_bytes(t, blocks);
    const guarded x = guard(row), y = guard(column);
    // under AddressSanitizer the heap finds what goes one byte too far on either side
    uint8_t * hx = malloc(row), * hy = malloc(column);
    fill_row(t, blocks, style, x.start);
    fill_column(t, blocks, style, y.start);
    memcpy(hx, x.start, row);
    memcpy(hy, y.start, column);
    float fast = NAN, generic = NAN, heap = NAN;
    t->fast   (blocks*t->block, &fast,    0, x.start, 0, y.start, 0, 1);
    t->generic(blocks*t->block, &generic, 0, x.start, 0, y.start, 0, 1);
    t->fast   (blocks*t->block, &heap,    0, hx, 0, hy, 0, 1);
    double size;
    const double exact = reference(t, blocks, hx, hy, &size);
    const int bad = !agrees(fast, exact, size, style) || !agrees(generic, exact, size, style) || fast != heap;
    if (bad) {
        fprintf(stderr, "dot %s, %d blocks, style %d: %.9g, portable %.9g, heap %.9g, exact %.9g\n", t->name, blocks, style, (double) fast,
            (double) generic, (double) heap, exact);
    }
    free(hx);
    free(hy);
    munmap(x.map, x.bytes);
    munmap(y.map, y.bytes);
    return bad;
}

#if defined(D2Q_X86) || defined(D2Q_ARM)

// activations of `blocks` blocks; the reference is ggml's, one number at a time
static int check_quantizer(int blocks, int style) {
    const int n = blocks*QK_K;
    const guarded x = guard(sizeof(float)*(size_t) n), y = guard(sizeof(block_q8_K)*(size_t) blocks);
    float * values = (float *) (void *) x.start;
    for (int j = 0; j < n; j++) {
        const float uniform = (float) (int32_t) (next() << 8)/(float) (1u << 31);
        switch (style) {
            case 0:  values[j] = uniform; break;
            case 1:  values[j] = ldexpf(uniform, (int) (next()%60) - 30); break;
            case 2:  values[j] = (float) (next()%255) - 127.0f + (next()%2 ? 0.5f : 0.0f); break; // halfway between two codes
            case 3:  values[j] = (float) (next()%3) - 1.0f; break;                               // the largest with both signs
            case 4:  values[j] = ldexpf(uniform, -118); break; // below, the scale is infinite
            default: values[j] = next()%2 ? 0.0f : -0.0f;
        }
    }
    memset(y.start, 0xFF, sizeof(block_q8_K)*(size_t) blocks);
    d2q_quantize_row_q8_K(values, y.start, n);
    int bad = 0;
    for (int i = 0; i < blocks; i++, values += QK_K) {
        const block_q8_K * b = (const block_q8_K *) (void *) y.start + i;
        float extreme = 0;
        for (int j = 0; j < QK_K; j++) { extreme = fabsf(values[j]) > fabsf(extreme) ? values[j] : extreme; }
        const float scale = -127.0f/extreme;
        bad += b->d != (extreme == 0 ? 0 : 1/scale);
        for (int j = 0; j < QK_K; j += 16) {
            int sum = 0;
            for (int e = j; e < j + 16; e++) {
                const volatile float scaled = values[e]*scale; // rounded on its own, not fused with what follows
                bad += b->qs[e] != (extreme == 0 ? 0 : (int) nearbyintf(scaled));
                sum += b->qs[e];
            }
            bad += b->bsums[j/16] != sum;
        }
    }
    if (bad) { fprintf(stderr, "quantizer, %d blocks, style %d: %d differences\n", blocks, style, bad); }
    munmap(x.map, x.bytes);
    munmap(y.map, y.bytes);
    return bad != 0;
}

#endif

#if defined(D2Q_REPACK)

// row r of interleaved rows is what it was
#define SAME_ROW(type) \
    static bool same_##type(const uint8_t * x, const uint8_t * interleaved, int r) { \
        block_##type row; \
        type##_row((const block_##type##x8 *) (const void *) interleaved, r, &row); \
        return memcmp(&row, x, sizeof(row)) == 0; \
    }
SAME_ROW(d2q2) SAME_ROW(d2q3) SAME_ROW(d2q2_64) SAME_ROW(d2q3_64)

static bool same_row(const type_t * t, const uint8_t * x, const uint8_t * interleaved, int r) {
    return (t->id == GGML_TYPE_D2Q2 ? same_d2q2 : t->id == GGML_TYPE_D2Q3 ? same_d2q3 : t->id == GGML_TYPE_D2Q2_64 ? same_d2q2_64 : same_d2q3_64)(x, interleaved, r);
}

static int check_repacked(const type_t * t, int blocks, int style, int n_rows) {
    const size_t row = row_bytes(t, blocks), column = column_bytes(t, blocks);
    const guarded x = guard(row*(size_t) n_rows), inter = guard(row*(size_t) n_rows), y = guard(column), out = guard(sizeof(float)*(size_t) n_rows);
    float * results = (float *) (void *) out.start;
    for (int r = 0; r < n_rows; r++) { fill_row(t, blocks, style, x.start + (size_t) r*row); }
    fill_column(t, blocks, style, y.start);
    memset(out.start, 0xFF, sizeof(float)*(size_t) n_rows);
    d2q_repack(t->id, (int64_t) blocks*t->block, n_rows, x.start, inter.start);
    d2q_gemv(t->id, blocks*t->block, inter.start, n_rows, y.start, results);
    int bad = 0;
    for (int r = 0; r < n_rows; r++) {
        double size;
        const double exact = reference(t, blocks, x.start + (size_t) r*row, y.start, &size);
        bool good = agrees(results[r], exact, size, style);
        for (int i = 0; i < blocks; i++) {
            const size_t group = (size_t) (r/D2Q_ROWS*D2Q_ROWS)*row + (size_t) (i*D2Q_ROWS*t->size);
            good = good && same_row(t, x.start + (size_t) r*row + i*t->size, inter.start + group, r%D2Q_ROWS);
        }
        if (!good && bad++ == 0) {
            fprintf(stderr, "repacked %s, %d blocks, style %d, %d rows: row %d: %.9g, exact %.9g\n", t->name, blocks, style, n_rows, r, (double) results[r], exact);
        }
    }
    munmap(x.map, x.bytes);
    munmap(inter.map, inter.bytes);
    munmap(y.map, y.bytes);
    munmap(out.map, out.bytes);
    return bad != 0;
}

#endif

#if defined(D2Q_GEMM)

static int check_gemm(const type_t * t, int blocks, int style, int n_rows, int n_columns, bool repacked) {
    const size_t row = row_bytes(t, blocks), column = column_bytes(t, blocks);
    const guarded x = guard(row*(size_t) n_rows), inter = guard(row*(size_t) n_rows);
    guarded y[D2Q_GEMM_PANEL], out[D2Q_GEMM_PANEL];
    const void * columns[D2Q_GEMM_PANEL];
    float      * results[D2Q_GEMM_PANEL];
    for (int r = 0; r < n_rows; r++) { fill_row(t, blocks, style, x.start + (size_t) r*row); }
    for (int c = 0; c < n_columns; c++) {
        y[c]   = guard(column);
        out[c] = guard(sizeof(float)*(size_t) n_rows);
        fill_column(t, blocks, style, y[c].start);
        columns[c] = y[c].start;
        results[c] = (float *) (void *) out[c].start;
        memset(out[c].start, 0xFF, sizeof(float)*(size_t) n_rows);
    }
    if (repacked) { d2q_repack(t->id, (int64_t) blocks*t->block, n_rows, x.start, inter.start); }
    d2q_gemm(t->id, blocks*t->block, repacked ? inter.start : x.start, row, repacked, n_rows, columns, results, n_columns);
    int bad = 0;
    for (int c = 0; c < n_columns; c++) {
        for (int r = 0; r < n_rows; r++) {
            double size;
            const double exact = reference(t, blocks, x.start + (size_t) r*row, y[c].start, &size);
            if (!agrees(results[c][r], exact, size, style)) {
                if (bad++ == 0) {
                    fprintf(stderr, "gemm %s, %d blocks, style %d, %dx%d: row %d, column %d: %.9g, exact %.9g\n", t->name, blocks, style, n_rows,
                        n_columns, r, c, (double) results[c][r], exact);
                }
            }
        }
        munmap(y[c].map, y[c].bytes);
        munmap(out[c].map, out[c].bytes);
    }
    munmap(x.map, x.bytes);
    munmap(inter.map, inter.bytes);
    return bad != 0;
}

#endif

int main(void) {
    for (int i = 0; i < 1 << 16; i++) {
        ggml_table_f32_f16[i] = GGML_COMPUTE_FP16_TO_FP32((ggml_half) i);
    }
    d2q_cpu_init();
    d2q_repack_init();
    int bad = 0, checks = 0;
#if defined(D2Q_X86) || defined(D2Q_ARM)
    for (int repeat = 0; repeat < 300; repeat++, checks++) { bad += check_quantizer(1 + repeat%4, repeat%6); }
#endif
    for (size_t t = 0; t < sizeof(types)/sizeof(types[0]); t++) {
        for (int style = 0; style < STYLES; style++) {
            const bool slow = style == UNIT_LARGEST || style == UNIT_SMALLEST; // searches for its codes; there is only one such row
            for (int blocks = 1; blocks <= 17; blocks += blocks < 4 ? 1 : 13) {
                for (int repeat = 0; repeat < (slow ? 1 : 20); repeat++, checks++) { bad += check_dot(&types[t], blocks, style); }
            }
#if defined(D2Q_REPACK)
            for (int blocks = 1; blocks <= 5; blocks += blocks < 3 ? 1 : 2) {
                for (int rows = 8; rows <= (slow ? 8 : 24); rows += 8, checks++) { bad += check_repacked(&types[t], blocks, style, rows); }
            }
#endif
#if defined(D2Q_GEMM)
            static const int shapes[][2] = {{1, 1}, {1, 4}, {3, 5}, {8, 4}, {9, 7}, {17, 12}, {72, 9}, {70, 6}, {13, D2Q_GEMM_PANEL}};
            for (size_t s = 0; s < (slow ? 6 : sizeof(shapes)/sizeof(shapes[0])); s++, checks++) {
                bad += check_gemm(&types[t], 1 + (int) s%3, style, shapes[s][0], shapes[s][1], false);
                if (shapes[s][0]%D2Q_ROWS == 0) { bad += check_gemm(&types[t], 1 + (int) s%3, style, shapes[s][0], shapes[s][1], true); }
            }
#endif
        }
        if (d2q_can_repack(types[t].id, 24) !=
#if defined(D2Q_REPACK)
            true
#else
            false
#endif
            || d2q_can_repack(types[t].id, 20) || d2q_can_repack(GGML_TYPE_Q2_K, 24)) { bad++; }
        if (d2q_has_gemm(types[t].id) !=
#if defined(D2Q_GEMM)
            true
#else
            false
#endif
        ) { bad++; }
    }
    // one column: four shares for each thread, none smaller than ggml's; other types and several columns: as ggml has it
    const bool shares = d2q_chunk_size(GGML_TYPE_D2Q3_64, 5632, 1, 2, 64) == 704 && d2q_chunk_size(GGML_TYPE_D2Q2, 1, 4097, 1, 64) == 1025
        && d2q_chunk_size(GGML_TYPE_D2Q2, 100, 1, 8, 64) == 64 && d2q_chunk_size(GGML_TYPE_Q2_K, 5632, 1, 2, 64) == 64
        && d2q_chunk_size(GGML_TYPE_D2Q2, 5632, 8, 2, 16) == (d2q_has_gemm(GGML_TYPE_D2Q2) ? D2Q_GEMM_PANEL : 16);
    if (!shares) {
        fprintf(stderr, "sizes of shares\n");
        bad++;
    }
    printf("%d checks, %d bad\n", checks, bad);
    return bad != 0;
}
