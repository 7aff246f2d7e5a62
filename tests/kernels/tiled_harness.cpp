// Checks tiled.cpp's matrix multiplications (MUL_MAT and one expert of MUL_MAT_ID) for d2q2 and d2q3 as this compiler
// target has them, with rows as they are in a file and interleaved. test_sources.py compiles it with their sources for several targets, also under sanitizers. The
// reference is made here: sums of integers from d2q-blocks.h, which must come out exactly where all scales are +-1.

#include "ggml-cpu/tiled/tiled.cpp"

#include "d2q/d2q-blocks.h"
#include "d2q/d2q-cpu.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <random>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

// what tiled.cpp and the kernels want from the rest of ggml
extern "C" {
float ggml_table_f32_f16[1 << 16];
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}
void ggml_abort(const char * file, int line, const char *, ...) {
    fprintf(stderr, "%s:%d: abort\n", file, line);
    abort();
}
void ggml_barrier(ggml_threadpool *) {}
static int chunk;
void ggml_threadpool_chunk_set(ggml_threadpool *, int value) { chunk = value; }
int ggml_threadpool_chunk_add(ggml_threadpool *, int value) {
    chunk += value;
    return chunk - value;
}
float ggml_fp16_to_fp32(ggml_fp16_t x) { return GGML_COMPUTE_FP16_TO_FP32(x); }
void quantize_row_q8_K(const float *, void *, int64_t) { abort(); } // the portable fallback's
size_t ggml_type_size(ggml_type type) {
    return type == GGML_TYPE_D2Q2 ? sizeof(block_d2q2) : type == GGML_TYPE_D2Q3 ? sizeof(block_d2q3) : sizeof(block_q8_K);
}
int64_t ggml_blck_size(ggml_type) { return QK_K; }
size_t ggml_row_size(ggml_type type, int64_t n) { return (size_t) (n/QK_K)*ggml_type_size(type); }
int64_t ggml_nelements(const ggml_tensor * t) { return t->ne[0]*t->ne[1]*t->ne[2]*t->ne[3]; }
bool ggml_is_contiguous(const ggml_tensor *) { return true; }
const ggml_type_traits_cpu * ggml_get_type_traits_cpu(ggml_type type) {
    static const ggml_type_traits_cpu q8_K = { d2q_quantize_row_q8_K, nullptr, GGML_TYPE_Q8_K, 1 };
    static const ggml_type_traits_cpu d2q  = { nullptr, nullptr, GGML_TYPE_Q8_K, 1 };
    return type == GGML_TYPE_Q8_K ? &q8_K : &d2q;
}
}

static std::mt19937 generator(1);

static int draw(int low, int high) { return low + (int) (generator()%(unsigned) (high - low + 1)); }

// the last byte is the last of its page; nothing before its first page or after it can be read
struct guarded {
    uint8_t * map, * start;
    size_t    bytes;
    explicit guarded(size_t size) {
        const size_t page = (size_t) sysconf(_SC_PAGESIZE), body = (size + page - 1)/page*page;
        bytes = body + 2*page;
        map   = (uint8_t *) mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED || mprotect(map, page, PROT_NONE) || mprotect(map + page + body, page, PROT_NONE)) {
            perror("mmap");
            exit(2);
        }
        start = map + page + body - size;
    }
    guarded(const guarded &) = delete;
    ~guarded() { munmap(map, bytes); }
};

// ggml makes no activation below -127, and the stock kernel for AVX without AVX2 can't do with -128
#if defined(D2Q_X86)
static const int LOWEST = -128;
#else
static const int LOWEST = -127;
#endif

enum style { RANDOM, UNIT, UNIT_LARGEST, STYLES }; // scales are +-1, and activations and entries as large as they get

// a codebook and a byte of codes whose entries have the largest sum
template <typename B> static void largest(B * x, void (*group)(const B *, int, int8_t *)) {
    static int best = 0, book, codes;
    for (int candidate = best ? 256*16 : 0; candidate < 256*16; candidate++) {
        int8_t entries[D2Q_GROUP];
        const int byte = candidate%16*17;
        memset(x->cb, candidate/16, sizeof(x->cb));
        memset(x->qs, byte, sizeof(*x) - offsetof(B, qs));
        group(x, 0, entries);
        int sum = 0;
        for (int8_t entry : entries) { sum += entry; }
        if (sum > best) {
            best  = sum;
            book  = candidate/16;
            codes = byte;
        }
    }
    memset(x->cb, book, sizeof(x->cb));
    memset(x->qs, codes, sizeof(*x) - offsetof(B, qs));
}

struct matrix {
    ggml_tensor tensor{};
    matrix(ggml_type type, void * data, size_t size, int64_t n0, int64_t n1, int64_t n2) {
        tensor.type = type;
        tensor.data = data;
        const int64_t ne[4] = { n0, n1, n2, 1 };
        const size_t  nb[4] = { size, (type == GGML_TYPE_F32 ? (size_t) n0 : (size_t) n0/QK_K)*size, 0, 0 };
        memcpy(tensor.ne, ne, sizeof(ne));
        memcpy(tensor.nb, nb, sizeof(nb));
        tensor.nb[2] = tensor.nb[1]*(size_t) n1;
        tensor.nb[3] = tensor.nb[2]*(size_t) n2;
    }
};

// rows times columns of n weights; as MUL_MAT, or as an expert that gets the columns in another order
template <typename B>
static int check(ggml_type type, void (*group)(const B *, int, int8_t *), style kind, int blocks, int n_rows, int n_columns, bool expert, bool repacked) {
    const int n = blocks*QK_K;
    const guarded x(sizeof(B)*(size_t) (blocks*n_rows)), y(sizeof(block_q8_K)*(size_t) (blocks*n_columns));
    const guarded out(sizeof(float)*(size_t) (n_rows*n_columns)), inter(sizeof(B)*(size_t) (blocks*n_rows));
    B * rows = (B *) x.start;
    block_q8_K * columns = (block_q8_K *) y.start;
    for (size_t i = 0; i < sizeof(B)*(size_t) (blocks*n_rows); i++) { x.start[i] = (uint8_t) draw(0, 255); }
    for (int i = 0; i < blocks*n_rows; i++) {
        const uint16_t d = (uint16_t) ((kind == RANDOM ? draw(0x2000, 0x2FFF) : 0x3C00) | draw(0, 1) << 15);
        memcpy(&rows[i].d, &d, 2);
        if (kind == UNIT_LARGEST) { largest(&rows[i], group); }
    }
    for (int i = 0; i < blocks*n_columns; i++) {
        columns[i].d = kind == RANDOM ? 0.01f*(float) draw(1, 100) : draw(0, 1) ? 1.0f : -1.0f;
        memset(columns[i].bsums, 0, sizeof(columns[i].bsums));
        for (int j = 0; j < QK_K; j++) {
            columns[i].qs[j] = (int8_t) (kind == UNIT_LARGEST ? LOWEST : draw(LOWEST, 127));
            columns[i].bsums[j/16] = (int16_t) (columns[i].bsums[j/16] + columns[i].qs[j]);
        }
    }
    matrix a(type, x.start, sizeof(B), n, n_rows, 1), b(GGML_TYPE_Q8_K, y.start, sizeof(block_q8_K), n, expert ? 1 : n_columns, expert ? n_columns : 1);
    matrix c(GGML_TYPE_F32, out.start, sizeof(float), n_rows, expert ? 1 : n_columns, expert ? n_columns : 1);
    if (repacked) {
        d2q_repack(type, n, n_rows, x.start, inter.start);
        a.tensor.data  = inter.start;
        a.tensor.extra = &a; // as the buffer type of interleaved weights marks them
    }
    c.tensor.src[0] = &a.tensor;
    c.tensor.src[1] = &b.tensor;
    std::vector<uint8_t> work(ggml_tiled_wdata_size(1, &c.tensor) + 64, 0xFF); // not a number wherever nothing was written
    ggml_compute_params params{};
    params.nth   = 1;
    params.wsize = work.size();
    params.wdata = work.data();
    std::vector<int32_t> order;
    for (int j = 0; j < n_columns; j++) {
        order.push_back(0);
        order.push_back(n_columns - 1 - j);
    }
    char * scratch = (char *) (((uintptr_t) work.data() + 63) & ~(uintptr_t) 63);
    if (!(expert ? ggml_compute_forward_mul_mat_id_tiled(&params, &c.tensor, 0, n_columns, order.data(), scratch)
                 : ggml_compute_forward_mul_mat_tiled(&params, &c.tensor))) {
        return n_columns < 8 || ggml_tiled_wdata_size(1, &c.tensor) == 0 ? 0 : 1;
    }
    int bad = 0;
    std::vector<int8_t> entries((size_t) n);
    for (int r = 0; r < n_rows; r++) {
        for (int k = 0; k < n/D2Q_GROUP; k++) { group(&rows[r*blocks + k/8], k%8, &entries[(size_t) (D2Q_GROUP*k)]); }
        for (int j = 0; j < n_columns; j++) {
            double exact = 0, size = 0;
            for (int i = 0; i < blocks; i++) {
                int64_t sum = 0, magnitude = 0;
                for (int e = 0; e < QK_K; e++) {
                    const int product = entries[(size_t) (QK_K*i + e)]*columns[j*blocks + i].qs[e];
                    sum += product;
                    magnitude += abs(product);
                }
                const double d = (double) GGML_COMPUTE_FP16_TO_FP32(rows[r*blocks + i].d)*(double) columns[j*blocks + i].d;
                exact += d*(double) sum;
                size  += std::fabs(d)*(double) magnitude;
            }
            const double value = (double) ((const float *) out.start)[j*n_rows + r];
            // sums of integers below 2^24 are exact in float, in any order
            if (!(kind != RANDOM && size < 1 << 24 ? value == exact : std::fabs(value - exact) <= 1e-6*size) && bad++ == 0) {
                fprintf(stderr, "%d blocks, %dx%d, style %d, expert %d, repacked %d: row %d, column %d: %.9g, exact %.9g\n", blocks, n_rows, n_columns,
                    (int) kind, expert, repacked, r, j, value, exact);
            }
        }
    }
    return bad != 0;
}

static int check_type(int blocks, int n_rows, int n_columns, int * checks) {
    int bad = 0;
    for (int kind = 0; kind < STYLES; kind++) {
        for (int expert = 0; expert < 2; expert++) {
            for (int repacked = 0; repacked <= d2q_can_repack(GGML_TYPE_D2Q2, n_rows); repacked++, *checks += 2) {
                bad += check<block_d2q2>(GGML_TYPE_D2Q2, d2q2_group, (style) kind, blocks, n_rows, n_columns, expert, repacked);
                bad += check<block_d2q3>(GGML_TYPE_D2Q3, d2q3_group, (style) kind, blocks, n_rows, n_columns, expert, repacked);
            }
        }
    }
    return bad;
}

int main() {
    for (int i = 0; i < 1 << 16; i++) { ggml_table_f32_f16[i] = GGML_COMPUTE_FP16_TO_FP32((ggml_half) i); }
    d2q_cpu_init();
    int bad = 0, checks = 0;
    // up to 16 columns take several blocks at a time; 256 rows or columns are a window
    static const int shapes[][3] = {{1, 1, 8}, {3, 16, 8}, {4, 17, 11}, {5, 37, 16}, {1, 33, 17}, {3, 20, 40}, {2, 270, 19}, {1, 18, 270}, {2, 280, 19}, {3, 200, 24}};
    for (const auto & s : shapes) { bad += check_type(s[0], s[1], s[2], &checks); }
    printf("%d checks, %d bad\n", checks, bad);
    return bad != 0;
}
