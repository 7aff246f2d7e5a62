#include "d2q-quants.h"
#include "d2q-blocks.h"

#include "ggml-impl.h"
#include "ggml-threading.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
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

// ---- reference encoder ----
//
// A block has one scale d; its groups choose a codebook each. For a given d, the best codebook of a group is a search
// over 256 tables, too slow to do exactly for every d. So the search is done on a grid: a table made once holds, for
// each cell of normalized values (x/d), the squared distance from the cell's centre to the nearest entry of each of the
// 256 codebooks. Summing 16 or 32 rows of it ranks all codebooks of a group at once. The best few of the best few d are
// then measured exactly, and d is refitted by least squares.

#define D2Q_BOOKS       256
#define D2Q_SCALES      16     // values of d tried on the grid, 0.6 to 2 times RMS/unit, geometric
#define D2Q_SCALES_KEPT 3      // of them measured exactly
#define D2Q_BOOKS_KEPT  8      // codebooks of each group measured exactly
#define D2Q_REFITS      3      // rounds of least squares for d
#define D2Q_PAIR_LEVELS 65     // grid levels of one component of a pair: -32..32 through d2q_pair_levels
#define D2Q_VALUE_MAX   191    // largest normalized value on the pair grid
#define D2Q_SCALAR_MAX  127    // and on the scalar grid

// halved squared distances (they reach 2*(191 + 64)^2) so that 16 bits hold them
static uint16_t d2q_pair_grid[D2Q_PAIR_LEVELS*D2Q_PAIR_LEVELS][D2Q_BOOKS];
static uint16_t d2q_scalar_grid[2*D2Q_SCALAR_MAX + 1][D2Q_BOOKS];
static uint8_t  d2q_pair_level[2*D2Q_VALUE_MAX + 1]; // rounded value + D2Q_VALUE_MAX -> grid level
static float    d2q_unit[2];                         // RMS of the table entries: scalars, pairs
static bool     d2q_grids_ready = false;

// centre of a level of the pair grid: steps of 2 up to 32, of 4 up to 64, of 16 up to 192
static int d2q_level_value(int level) {
    const int a = abs(level - 32);
    const int v = a <= 16 ? 2*a : a <= 24 ? 32 + 4*(a - 16) : 64 + 16*(a - 24);
    return level < 32 ? -v : v;
}

static void d2q_make_grids(void) {
    double square[2] = {0, 0};
    for (int b = 0; b < D2Q_BOOKS; b++) {
        for (int i = 0; i < 8; i++)  { square[0] += d2q_scalar_table[b][i]*d2q_scalar_table[b][i]; }
        for (int i = 0; i < 32; i++) { square[1] += d2q_pair_table[b][i/16][i%16]*d2q_pair_table[b][i/16][i%16]; }
    }
    d2q_unit[0] = (float) sqrt(square[0]/(D2Q_BOOKS*8));
    d2q_unit[1] = (float) sqrt(square[1]/(D2Q_BOOKS*32));

    for (int v = -D2Q_VALUE_MAX; v <= D2Q_VALUE_MAX; v++) {
        int best = 0;
        for (int level = 1; level < D2Q_PAIR_LEVELS; level++) {
            if (abs(d2q_level_value(level) - v) < abs(d2q_level_value(best) - v)) { best = level; }
        }
        d2q_pair_level[v + D2Q_VALUE_MAX] = (uint8_t) best;
    }
    for (int cell = 0; cell < D2Q_PAIR_LEVELS*D2Q_PAIR_LEVELS; cell++) {
        const int v0 = d2q_level_value(cell/D2Q_PAIR_LEVELS), v1 = d2q_level_value(cell%D2Q_PAIR_LEVELS);
        for (int b = 0; b < D2Q_BOOKS; b++) {
            int best = INT32_MAX;
            for (int code = 0; code < 16; code++) {
                const int e0 = v0 - d2q_pair_table[b][0][code], e1 = v1 - d2q_pair_table[b][1][code];
                best = MIN(best, e0*e0 + e1*e1);
            }
            d2q_pair_grid[cell][b] = (uint16_t) (best/2);
        }
    }
    for (int v = -D2Q_SCALAR_MAX; v <= D2Q_SCALAR_MAX; v++) {
        for (int b = 0; b < D2Q_BOOKS; b++) {
            int best = INT32_MAX;
            for (int code = 0; code < 8; code++) {
                const int e = v - d2q_scalar_table[b][code];
                best = MIN(best, e*e);
            }
            d2q_scalar_grid[v + D2Q_SCALAR_MAX][b] = (uint16_t) (best/2);
        }
    }
}

static void d2q_init(void) {
    ggml_critical_section_start();
    if (!d2q_grids_ready) {
        d2q_make_grids();
        d2q_grids_ready = true;
    }
    ggml_critical_section_end();
}

// one block while it is being encoded
typedef struct {
    float        d;              // as stored: rounded to fp16
    double       error;          // sum of weight * (x - d*entry)^2
    uint8_t      cb[8];
    uint8_t      codes[256];     // group by group: 16 pairs or 32 weights
} d2q_choice;

// rounded and clamped value; what lies beyond the grid goes to *excess as a squared distance
static inline int d2q_grid_value(float v, int max, float weight, double * excess) {
    const float a = fabsf(v);
    if (a <= max) {
        return (int) lrintf(v);
    }
    const float beyond = a - (float) max;
    *excess += (double) (weight*beyond*beyond);
    return v < 0 ? -max : max;
}

// approximate error of each codebook for one group, in units of d^2; returns the sum of what lies beyond the grid
static double d2q_rank_books(const float * x, const float * w, float inv, bool paired, float * cost) {
    double excess = 0;
    memset(cost, 0, D2Q_BOOKS*sizeof(float));
    for (int i = 0; i < (paired ? 16 : 32); i++) {
        const uint16_t * row;
        float weight;
        if (paired) {
            // the two weights of a pair may differ in importance; the grid can't know, the exact step does
            weight = w[i] + w[i + 16];
            const int v0 = d2q_grid_value(x[i]*inv,      D2Q_VALUE_MAX, w[i],      &excess);
            const int v1 = d2q_grid_value(x[i + 16]*inv, D2Q_VALUE_MAX, w[i + 16], &excess);
            row = d2q_pair_grid[d2q_pair_level[v0 + D2Q_VALUE_MAX]*D2Q_PAIR_LEVELS + d2q_pair_level[v1 + D2Q_VALUE_MAX]];
        } else {
            weight = 2*w[i];
            row = d2q_scalar_grid[d2q_grid_value(x[i]*inv, D2Q_SCALAR_MAX, w[i], &excess) + D2Q_SCALAR_MAX];
        }
        for (int b = 0; b < D2Q_BOOKS; b++) {
            cost[b] += weight*(float) row[b];
        }
    }
    return excess;
}

// the best codes of one group for codebook b; returns the exact weighted error
static double d2q_encode_group(const float * x, const float * w, float d, bool paired, int b, uint8_t * codes) {
    double error = 0;
    for (int i = 0; i < (paired ? 16 : 32); i++) {
        float best = INFINITY;
        int   code = 0;
        for (int c = 0; c < (paired ? 16 : 8); c++) {
            float e;
            if (paired) {
                const float e0 = x[i] - d*d2q_pair_table[b][0][c], e1 = x[i + 16] - d*d2q_pair_table[b][1][c];
                e = w[i]*e0*e0 + w[i + 16]*e1*e1;
            } else {
                const float e0 = x[i] - d*d2q_scalar_table[b][c];
                e = w[i]*e0*e0;
            }
            if (e < best) { best = e; code = c; }
        }
        codes[i] = (uint8_t) code;
        error += (double) best;
    }
    return error;
}

static float d2q_round_scale(float d) {
    return GGML_FP16_TO_FP32(GGML_FP32_TO_FP16(MIN(d, 65504.0f))); // the largest fp16
}

// the least-squares d of a choice: sum w*x*entry / sum w*entry^2
static float d2q_refit_scale(const float * x, const float * w, int groups, bool paired, const d2q_choice * choice) {
    double xt = 0, tt = 0;
    for (int g = 0; g < groups; g++) {
        for (int j = 0; j < D2Q_GROUP; j++) {
            const int b = choice->cb[g];
            const float t = paired ? d2q_pair_table[b][j/16][choice->codes[16*g + j%16]] : d2q_scalar_table[b][choice->codes[32*g + j]];
            const int n = D2Q_GROUP*g + j;
            xt += (double) (w[n]*x[n]*t);
            tt += (double) (w[n]*t*t);
        }
    }
    return tt > 0 && xt > 0 ? (float) (xt/tt) : choice->d;
}

// the D2Q_BOOKS_KEPT smallest of 256 costs, best first
static void d2q_smallest(const float * cost, uint8_t * books) {
    float kept[D2Q_BOOKS_KEPT];
    int n = 0;
    for (int b = 0; b < D2Q_BOOKS; b++) {
        if (n == D2Q_BOOKS_KEPT && !(cost[b] < kept[n - 1])) {
            continue;
        }
        int at = n < D2Q_BOOKS_KEPT ? n++ : n - 1;
        for (; at > 0 && cost[b] < kept[at - 1]; at--) {
            kept[at]  = kept[at - 1];
            books[at] = books[at - 1];
        }
        kept[at]  = cost[b];
        books[at] = (uint8_t) b;
    }
}

// measure the candidate codebooks of every group exactly at scale d; *best is replaced if the result is better
static void d2q_try_scale(const float * x, const float * w, int groups, bool paired, float d, const uint8_t (*books)[D2Q_BOOKS_KEPT], d2q_choice * best) {
    const int codes = paired ? 16 : 32;
    d2q_choice choice = { .d = d };
    for (int g = 0; g < groups; g++) {
        double error = (double) INFINITY;
        for (int n = 0; n < D2Q_BOOKS_KEPT; n++) {
            uint8_t tried[32];
            const double e = d2q_encode_group(x + D2Q_GROUP*g, w + D2Q_GROUP*g, d, paired, books[g][n], tried);
            if (e < error) {
                error = e;
                choice.cb[g] = books[g][n];
                memcpy(choice.codes + codes*g, tried, codes);
            }
        }
        choice.error += error;
    }
    if (choice.error < best->error) {
        *best = choice;
    }
}

// choose scale, codebooks and codes of one block of groups*32 values; w: a weight for each value
static d2q_choice d2q_encode_block(const float * x, const float * w, int groups, bool paired) {
    d2q_choice best = { .error = (double) INFINITY };
    double square = 0;
    for (int j = 0; j < D2Q_GROUP*groups; j++) {
        square += (double) x[j]*(double) x[j];
    }
    const float middle = (float) sqrt(square/(D2Q_GROUP*groups))/d2q_unit[paired];

    uint8_t books[D2Q_SCALES][8][D2Q_BOOKS_KEPT];
    float   scales[D2Q_SCALES];
    double  totals[D2Q_SCALES];
    for (int s = 0; s < D2Q_SCALES; s++) {
        scales[s] = d2q_round_scale(middle*0.6f*powf(2.0f/0.6f, (float) s/(D2Q_SCALES - 1)));
        totals[s] = (double) INFINITY;
        if (scales[s] == 0) {
            continue;
        }
        double total = 0;
        for (int g = 0; g < groups; g++) {
            float cost[D2Q_BOOKS];
            total += d2q_rank_books(x + D2Q_GROUP*g, w + D2Q_GROUP*g, 1/scales[s], paired, cost);
            d2q_smallest(cost, books[s][g]);
            total += (double) cost[books[s][g][0]];
        }
        totals[s] = total*(double) (scales[s]*scales[s]);
    }
    for (int kept = 0; kept < D2Q_SCALES_KEPT; kept++) {
        int s = 0;
        for (int t = 1; t < D2Q_SCALES; t++) {
            if (totals[t] < totals[s]) { s = t; }
        }
        if (!(totals[s] < (double) INFINITY)) {
            break; // nothing but zeros, or not finite: d stays 0
        }
        totals[s] = (double) INFINITY;
        const uint8_t (*candidates)[D2Q_BOOKS_KEPT] = (const uint8_t (*)[D2Q_BOOKS_KEPT]) books[s];
        d2q_choice local = { .error = (double) INFINITY };
        d2q_try_scale(x, w, groups, paired, scales[s], candidates, &local);
        for (int round = 0; round < D2Q_REFITS; round++) {
            const float d = d2q_round_scale(d2q_refit_scale(x, w, groups, paired, &local));
            if (d == local.d || d == 0) {
                break;
            }
            d2q_try_scale(x, w, groups, paired, d, candidates, &local);
        }
        if (local.error < best.error) {
            best = local;
        }
    }
    return best;
}

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
        y->qs[32*(k/4) + j] |= (uint8_t) ((c->codes[n] & 3) << (2*(k%4)));
        y->qh[j]            |= (uint8_t) ((c->codes[n] >> 2) << k);
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

#define D2Q_QUANTIZE(type, paired)                                                                                        \
    size_t quantize_##type(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) { \
        block_##type * y = dst;                                                                                           \
        const int groups = (int) sizeof(y->cb), block = D2Q_GROUP*groups;                                                 \
        assert(n_per_row % block == 0);                                                                                   \
        float ones[256];                                                                                                  \
        for (int j = 0; j < 256; j++) { ones[j] = 1; }                                                                    \
        d2q_init();                                                                                                       \
        for (int64_t i = 0; i < nrows*n_per_row/block; i++, y++) {                                                        \
            const float * w = imatrix ? imatrix + i*block%n_per_row : ones;                                               \
            const d2q_choice choice = d2q_encode_block(src + i*block, w, groups, paired);                                 \
            y->d = GGML_FP32_TO_FP16(choice.d);                                                                           \
            memcpy(y->cb, choice.cb, sizeof(y->cb));                                                                      \
            d2q_pack_##type(&choice, y);                                                                                  \
        }                                                                                                                 \
        return (size_t) (nrows*n_per_row/block)*sizeof(*y);                                             \
    }                                                                                                                     \
    void quantize_row_##type##_ref(const float * GGML_RESTRICT x, block_##type * GGML_RESTRICT y, int64_t k) {            \
        quantize_##type(x, y, 1, k, NULL);                                                                                \
    }

D2Q_QUANTIZE(d2q2,    true)
D2Q_QUANTIZE(d2q3,    false)
D2Q_QUANTIZE(d2q2_64, true)
D2Q_QUANTIZE(d2q3_64, false)
