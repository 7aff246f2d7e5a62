// Checks the dot products of d2q-cpu.c as this compiler target has them against the portable ones, on rows that end where
// their memory ends. The test compiles it with the kernel's own source for several targets, also under sanitizers.

#include "d2q/d2q-cpu.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// what ggml defines elsewhere and the sources under test refer to
float ggml_table_f32_f16[1 << 16];
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}

typedef void (*dot_t)(int, float *, size_t, const void *, size_t, const void *, size_t, int);

typedef struct {
    const char * name;
    int          block, size, codebooks;
    dot_t        fast, generic;
} type_t;

static const type_t types[] = {
    {"d2q2",    256, sizeof(block_d2q2),    8, ggml_vec_dot_d2q2_q8_K,    ggml_vec_dot_d2q2_q8_K_generic},
    {"d2q3",    256, sizeof(block_d2q3),    8, ggml_vec_dot_d2q3_q8_K,    ggml_vec_dot_d2q3_q8_K_generic},
    {"d2q2_64", 64,  sizeof(block_d2q2_64), 2, ggml_vec_dot_d2q2_64_q8_0, ggml_vec_dot_d2q2_64_q8_0_generic},
    {"d2q3_64", 64,  sizeof(block_d2q3_64), 2, ggml_vec_dot_d2q3_64_q8_0, ggml_vec_dot_d2q3_64_q8_0_generic},
};

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
    guarded g = { .bytes = body + page };
    g.map = mmap(NULL, g.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect(g.map + body, page, PROT_NONE)) {
        perror("mmap");
        exit(2);
    }
    g.start = g.map + body - size;
    return g;
}

static ggml_half half(uint16_t bits) {
    ggml_half h;
    memcpy(&h, &bits, 2);
    return h;
}

// style 0: random; 1, 2: all activations 127 or -127; 3: signs alternate; 4: one code everywhere
static void fill(const type_t * t, int blocks, int style, uint8_t * x, uint8_t * y) {
    for (int i = 0; i < blocks*t->size; i++) { x[i] = style == 4 ? 0xFF : (uint8_t) next(); }
    for (int i = 0; i < blocks; i++) {
        const ggml_half d = half((uint16_t) (0x2000 + next()%0x1000 + (next()%2 << 15)));
        memcpy(x + i*t->size, &d, 2);
    }
    for (int j = 0; j < blocks*t->block; j++) {
        const int q = style == 0 ? (int) (next()%255) - 127 : style == 1 || style == 4 ? 127 : style == 2 ? -127 : j%2 ? 127 : -127;
        if (t->block == 256) {
            block_q8_K * b = (block_q8_K *) y + j/256;
            if (j%256 == 0) {
                memset(b, 0, sizeof(*b));
                b->d = 0.01f*(float) (1 + next()%100);
            }
            b->qs[j%256] = (int8_t) q;
            b->bsums[j%256/16] = (int16_t) (b->bsums[j%256/16] + q);
        } else {
            block_q8_0 * b = (block_q8_0 *) y + j/32;
            b->d = j%32 ? b->d : half((uint16_t) (0x2000 + next()%0x1000));
            b->qs[j%32] = (int8_t) q;
        }
    }
}

// the sizes of what is added up, for a relative error
static double magnitude(const type_t * t, int blocks, const uint8_t * y) {
    double sum = 0;
    for (int j = 0; j < blocks*t->block; j++) {
        sum += t->block == 256 ? fabs(((const block_q8_K *) y)[j/256].d*((const block_q8_K *) y)[j/256].qs[j%256])
                               : fabs(ggml_table_f32_f16[*(const uint16_t *) &((const block_q8_0 *) y)[j/32].d]*((const block_q8_0 *) y)[j/32].qs[j%32]);
    }
    return sum;
}

static int check(const type_t * t, int blocks, int style) {
    const size_t row = (size_t) blocks*t->size;
    const size_t act = t->block == 256 ? (size_t) blocks*sizeof(block_q8_K) : (size_t) 2*blocks*sizeof(block_q8_0);
    const guarded x = guard(row), y = guard(act);
    // under AddressSanitizer the heap finds what goes one byte too far on either side
    uint8_t * hx = malloc(row), * hy = malloc(act);
    fill(t, blocks, style, x.start, y.start);
    memcpy(hx, x.start, row);
    memcpy(hy, y.start, act);
    float fast = NAN, generic = NAN, heap = NAN;
    t->fast   (blocks*t->block, &fast,    0, x.start, 0, y.start, 0, 1);
    t->generic(blocks*t->block, &generic, 0, x.start, 0, y.start, 0, 1);
    t->fast   (blocks*t->block, &heap,    0, hx, 0, hy, 0, 1);
    // d < 0.0156, entries at most 64
    const double bound = 1e-6*0.0157*64*magnitude(t, blocks, y.start);
    const int bad = !(fabs((double) fast - (double) generic) <= bound) || fast != heap;
    if (bad) {
        fprintf(stderr, "%s, %d blocks, style %d: %.9g, portable %.9g, heap %.9g\n", t->name, blocks, style, (double) fast, (double) generic, (double) heap);
    }
    free(hx);
    free(hy);
    munmap(x.map, x.bytes);
    munmap(y.map, y.bytes);
    return bad;
}

int main(void) {
    for (int i = 0; i < 1 << 16; i++) {
        ggml_table_f32_f16[i] = GGML_COMPUTE_FP16_TO_FP32((ggml_half) i);
    }
    d2q_cpu_init();
    int bad = 0, checks = 0;
    for (size_t t = 0; t < sizeof(types)/sizeof(types[0]); t++) {
        for (int style = 0; style < 5; style++) {
            for (int blocks = 1; blocks <= 17; blocks += blocks < 4 ? 1 : 13) {
                for (int repeat = 0; repeat < 20; repeat++, checks++) { bad += check(&types[t], blocks, style); }
            }
        }
    }
    printf("%d checks, %d bad\n", checks, bad);
    return bad != 0;
}
