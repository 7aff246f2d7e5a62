// A block has one scale d; its groups choose a codebook each. For a given d, the best codebook of a group is a search over
// 256 tables, too slow to do exactly for every d. So codebooks are ranked on a grid: a table made once holds, for each cell
// of normalized values x/d, the squared distance from the cell's centre to the nearest entry of each codebook. Adding 16
// or 32 rows of it ranks all codebooks of a group at once, and the best few are measured exactly.
//
// The entry of a scalar depends on the low bit of the code before it: the error of a codebook is that of the best path
// through two states (Viterbi), from the first weight of a chain to its last. The grid has a lower bound of it, as if every
// code could follow every other. That ranks less well, so more codebooks are measured.
//
// Scales are found as in tests/reference_encoder.py: a wide first round on the grid, the best of it exactly, then their
// neighbours, then least squares.

#include "d2q-encode.h"
#include "d2q-tables.h"

#include "ggml-impl.h"
#include "ggml-threading.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define GROUP         32
#define CHAIN         16                   // scalars in a row that depend on each other's codes
#define BOOKS         256
#define COARSE_SCALES 15                   // from 0.6 to 4.5 times RMS/unit: a block with an outlier wants a large d
#define KEPT_SCALES   5
#define KEPT_PAIRS    6                    // codebooks that are measured exactly
#define KEPT_SCALARS  48
#define REFITS        3
// Least squares makes what it approximates smaller, at two bits by 6 % of its power, and with it every product. A scale
// of a pair block 1 % above costs 0.2 % of squared error and keeps products within the bounds of test-quantize-fns.
#define PAIR_STRETCH  1.01f

// the grid of one component of a pair: steps of 1 to 12, of 2 to 40, of 4 to 64, of 16 to 128
#define PAIR_MAX      128
#define PAIR_LEVELS   73
#define PAIR_UNITS    4                    // grid entries are in 1/4
// the grid of single values: steps of 1/4
#define SCALAR_MAX    128
#define SCALAR_STEPS  4
#define SCALAR_UNITS  16
#define LARGEST_ENTRY 63

static uint16_t pair_grid  [PAIR_LEVELS*PAIR_LEVELS][BOOKS];
static uint16_t scalar_grid[2*SCALAR_MAX*SCALAR_STEPS + 1][BOOKS];
static uint8_t  pair_level [2*PAIR_MAX + 1];    // rounded value + PAIR_MAX -> level
static float    units[2];                       // RMS of the median codebook: scalars, pairs
static bool     ready = false;

static int level_value(int level) {
    const int a = abs(level - PAIR_LEVELS/2);
    const int v = a <= 12 ? a : a <= 26 ? 12 + 2*(a - 12) : a <= 32 ? 40 + 4*(a - 26) : 64 + 16*(a - 32);
    return level < PAIR_LEVELS/2 ? -v : v;
}

static int compare_floats(const void * a, const void * b) {
    const float x = *(const float *) a, y = *(const float *) b;
    return (x > y) - (x < y);
}

static float median_rms(bool paired) {
    float rms[BOOKS];
    for (int b = 0; b < BOOKS; b++) {
        const int8_t * entries = paired ? d2q_pair_table[b][0] : d2q_scalar_table[b];
        const int n = paired ? 32 : 16;
        int square = 0;
        for (int i = 0; i < n; i++) { square += entries[i]*entries[i]; }
        rms[b] = sqrtf((float) square/(float) n);
    }
    qsort(rms, BOOKS, sizeof(float), compare_floats);
    return (rms[BOOKS/2 - 1] + rms[BOOKS/2])/2;
}

static uint16_t saturated(float v) {
    return (uint16_t) MIN(v, 65535.0f);
}

static void make_grids(void) {
    units[0] = median_rms(false);
    units[1] = median_rms(true);
    for (int v = -PAIR_MAX; v <= PAIR_MAX; v++) {
        int best = 0;
        for (int level = 1; level < PAIR_LEVELS; level++) {
            if (abs(level_value(level) - v) < abs(level_value(best) - v)) { best = level; }
        }
        pair_level[v + PAIR_MAX] = (uint8_t) best;
    }
    for (int cell = 0; cell < PAIR_LEVELS*PAIR_LEVELS; cell++) {
        const int v0 = level_value(cell/PAIR_LEVELS), v1 = level_value(cell%PAIR_LEVELS);
        for (int b = 0; b < BOOKS; b++) {
            int best = INT32_MAX;
            for (int code = 0; code < 16; code++) {
                const int e0 = v0 - d2q_pair_table[b][0][code], e1 = v1 - d2q_pair_table[b][1][code];
                best = MIN(best, e0*e0 + e1*e1);
            }
            pair_grid[cell][b] = saturated((float) (PAIR_UNITS*best));
        }
    }
    for (int cell = 0; cell <= 2*SCALAR_MAX*SCALAR_STEPS; cell++) {
        const float v = (float) (cell - SCALAR_MAX*SCALAR_STEPS)/SCALAR_STEPS;
        for (int b = 0; b < BOOKS; b++) {
            float best = INFINITY;
            for (int i = 0; i < 16; i++) {
                const float e = v - (float) d2q_scalar_table[b][i];
                best = MIN(best, e*e);
            }
            scalar_grid[cell][b] = saturated(SCALAR_UNITS*best);
        }
    }
}

void d2q_encode_init(void) {
    ggml_critical_section_start();
    if (!ready) {
        make_grids();
        ready = true;
    }
    ggml_critical_section_end();
}

// a block while it is being encoded
typedef struct {
    const float * x;
    const float * w;
    int           groups;
    bool          paired;
} d2q_block;

// v clamped to the grid; what lies beyond goes to *excess, as if the nearest entry were the outermost
static inline float clamp_to_grid(float v, float max, float weight, float * excess) {
    const float a = fabsf(v);
    if (a <= max) {
        return v;
    }
    const float beyond = a - LARGEST_ENTRY, edge = max - LARGEST_ENTRY;
    *excess += weight*(beyond*beyond - edge*edge);
    return v < 0 ? -max : max;
}

// approximate errors of the codebooks for group g, in units of d^2
static void rank_books(const d2q_block * block, int g, float inverse, float * cost) {
    const float * x = block->x + GROUP*g, * w = block->w + GROUP*g;
    float excess = 0;
    memset(cost, 0, BOOKS*sizeof(float));
    for (int i = 0; i < (block->paired ? 16 : 32); i++) {
        const uint16_t * row;
        float            weight;
        if (block->paired) {
            // the two weights of a pair may differ in importance; the grid can't know, the exact step does
            weight = (w[i] + w[i + 16])/(2*PAIR_UNITS);
            const int v0 = (int) lrintf(clamp_to_grid(x[i]*inverse,      PAIR_MAX, w[i],      &excess)) + PAIR_MAX;
            const int v1 = (int) lrintf(clamp_to_grid(x[i + 16]*inverse, PAIR_MAX, w[i + 16], &excess)) + PAIR_MAX;
            row = pair_grid[pair_level[v0]*PAIR_LEVELS + pair_level[v1]];
        } else {
            weight = w[i]/SCALAR_UNITS;
            const float v = clamp_to_grid(x[i]*inverse, SCALAR_MAX, w[i], &excess);
            row = scalar_grid[(int) lrintf(v*SCALAR_STEPS) + SCALAR_MAX*SCALAR_STEPS];
        }
        for (int b = 0; b < BOOKS; b++) {
            cost[b] += weight*(float) row[b];
        }
    }
    for (int b = 0; b < BOOKS; b++) {
        cost[b] += excess;
    }
}

// the `count` smallest of 256 costs
static void smallest_costs(const float * cost, uint8_t * books, int count) {
    float kept[KEPT_SCALARS];
    int n = 0;
    for (int b = 0; b < BOOKS; b++) {
        if (n == count && !(cost[b] < kept[n - 1])) {
            continue;
        }
        int at = n < count ? n++ : n - 1;
        for (; at > 0 && cost[b] < kept[at - 1]; at--) {
            kept[at]  = kept[at - 1];
            books[at] = books[at - 1];
        }
        kept[at]  = cost[b];
        books[at] = (uint8_t) b;
    }
}

// errors[p][n][i]: of weight i with the best code whose low bit is n after one whose low bit is p
typedef float scalar_errors[2][2][GROUP];

static void measure_scalars(const float * x, const float * w, float d, const int8_t * table, scalar_errors errors) {
    for (int s = 0; s < 4; s++) {
        float * best = errors[s/2][s%2];
        const int8_t * entries = table + 8*(s/2) + s%2; // every other one
        const float e0 = d*entries[0], e1 = d*entries[2], e2 = d*entries[4], e3 = d*entries[6];
        for (int i = 0; i < GROUP; i++) {
            const float r0 = (x[i] - e0)*(x[i] - e0), r1 = (x[i] - e1)*(x[i] - e1);
            const float r2 = (x[i] - e2)*(x[i] - e2), r3 = (x[i] - e3)*(x[i] - e3);
            const float r01 = r0 < r1 ? r0 : r1, r23 = r2 < r3 ? r2 : r3;
            best[i] = w[i]*(r01 < r23 ? r01 : r23);
        }
    }
}

// the error of the best path through a group; bits: the low bits of its codes, or NULL. Of equal paths, the one to the
// even code. The chains go side by side, as each step waits for the one before.
static inline float best_path(const scalar_errors errors, uint8_t * bits) {
    enum { CHAINS = GROUP/CHAIN };
    float   cost[2][CHAINS];
    uint8_t from[2][GROUP]; // [n][i]: the low bit of the code before weight i on the best path to bit n
    for (int c = 0; c < CHAINS; c++) {
        cost[0][c] = 0;
        cost[1][c] = INFINITY;
    }
    for (int i = 0; i < CHAIN; i++) {
        for (int c = 0; c < CHAINS; c++) {
            const int   at = CHAIN*c + i;
            const float to00 = cost[0][c] + errors[0][0][at], to10 = cost[1][c] + errors[1][0][at];
            const float to01 = cost[0][c] + errors[0][1][at], to11 = cost[1][c] + errors[1][1][at];
            if (bits) {
                from[0][at] = to10 < to00;
                from[1][at] = to11 < to01;
            }
            cost[0][c] = to10 < to00 ? to10 : to00;
            cost[1][c] = to11 < to01 ? to11 : to01;
        }
    }
    float total = 0;
    for (int c = 0; c < CHAINS; c++) {
        uint8_t bit = cost[1][c] < cost[0][c];
        total += cost[bit][c];
        for (int i = CHAIN*(c + 1) - 1; i >= CHAIN*c && bits; i--) {
            bits[i] = bit;
            bit = from[bit][i];
        }
    }
    return total;
}

// exact error of group g with codebook b at scale d
static float book_error(const d2q_block * block, int g, float d, int b) {
    const float * x = block->x + GROUP*g, * w = block->w + GROUP*g;
    float error = 0;
    if (block->paired) {
        float best[GROUP/2];
        for (int i = 0; i < 16; i++) { best[i] = INFINITY; }
        for (int c = 0; c < 16; c++) {
            const float e0 = d*d2q_pair_table[b][0][c], e1 = d*d2q_pair_table[b][1][c];
            for (int i = 0; i < 16; i++) {
                const float r0 = x[i] - e0, r1 = x[i + 16] - e1;
                const float e  = w[i]*r0*r0 + w[i + 16]*r1*r1;
                best[i] = e < best[i] ? e : best[i];
            }
        }
        for (int i = 0; i < 16; i++) { error += best[i]; }
    } else {
        scalar_errors errors;
        measure_scalars(x, w, d, d2q_scalar_table[b], errors);
        error = best_path(errors, NULL);
    }
    return error;
}

// the best codes of a group of scalars with codebook b; of equal ones the first
static void scalar_codes(const d2q_block * block, int g, float d, int b, uint8_t * codes) {
    const float * x = block->x + GROUP*g, * w = block->w + GROUP*g;
    scalar_errors errors;
    uint8_t       bits[GROUP];
    measure_scalars(x, w, d, d2q_scalar_table[b], errors);
    best_path(errors, bits);
    for (int i = 0; i < GROUP; i++) {
        const int8_t * table = d2q_scalar_table[b] + (i%CHAIN ? 8*bits[i - 1] : 0);
        float best = INFINITY;
        for (int c = bits[i]; c < 8; c += 2) {
            const float r = x[i] - d*table[c];
            if (w[i]*r*r < best) {
                best = w[i]*r*r;
                codes[i] = (uint8_t) c;
            }
        }
    }
}

static void pair_codes(const d2q_block * block, int g, float d, int b, uint8_t * codes) {
    const float * x = block->x + GROUP*g, * w = block->w + GROUP*g;
    for (int i = 0; i < 16; i++) {
        float best = INFINITY;
        for (int c = 0; c < 16; c++) {
            const float r0 = x[i] - d*d2q_pair_table[b][0][c], r1 = x[i + 16] - d*d2q_pair_table[b][1][c];
            const float e  = w[i]*r0*r0 + w[i + 16]*r1*r1;
            if (e < best) {
                best = e;
                codes[i] = (uint8_t) c;
            }
        }
    }
}

// the best codes of a choice
static void choose_codes(const d2q_block * block, d2q_choice * choice) {
    for (int g = 0; g < block->groups; g++) {
        if (block->paired) {
            pair_codes(block, g, choice->d, choice->cb[g], choice->codes + 16*g);
        } else {
            scalar_codes(block, g, choice->d, choice->cb[g], choice->codes + 32*g);
        }
    }
}

// the entry of weight j of group g
static float chosen_entry(const d2q_block * block, const d2q_choice * choice, int g, int j) {
    const int b = choice->cb[g];
    if (block->paired) {
        return d2q_pair_table[b][j/16][choice->codes[16*g + j%16]];
    }
    const uint8_t * code = choice->codes + GROUP*g + j;
    return d2q_scalar_table[b][code[0] + (j%CHAIN ? 8*(code[-1] & 1) : 0)];
}

// as fp16 holds it: neither zero nor infinite
static float stored_scale(float d) {
    const float smallest = 5.9604645e-8f, largest = 65504.0f;
    return GGML_FP16_TO_FP32(GGML_FP32_TO_FP16(d > smallest ? MIN(d, largest) : smallest));
}

// choose codebooks at scale d; *best is replaced if the error is smaller
static void try_scale(const d2q_block * block, float d, d2q_choice * best, float * best_error) {
    if (d == best->d) {
        return;
    }
    d2q_choice choice = { .d = d };
    const int kept = block->paired ? KEPT_PAIRS : KEPT_SCALARS;
    float total = 0;
    for (int g = 0; g < block->groups; g++) {
        float   cost[BOOKS];
        uint8_t books[KEPT_SCALARS];
        rank_books(block, g, 1/d, cost);
        smallest_costs(cost, books, kept);
        float smallest = INFINITY;
        for (int n = 0; n < kept; n++) {
            const float error = book_error(block, g, d, books[n]);
            if (error < smallest) {
                smallest = error;
                choice.cb[g] = books[n];
            }
        }
        total += smallest;
    }
    if (total < *best_error) {
        *best       = choice;
        *best_error = total;
    }
}

// the least-squares d for the codes of a choice: sum of w*x*entry over sum of w*entry^2
static float refitted_scale(const d2q_block * block, d2q_choice * choice) {
    choose_codes(block, choice);
    double top = 0, bottom = 0;
    for (int i = 0; i < GROUP*block->groups; i++) {
        const float entry = chosen_entry(block, choice, i/GROUP, i%GROUP);
        top    += (double) (block->w[i]*block->x[i]*entry);
        bottom += (double) (block->w[i]*entry*entry);
    }
    return top > 0 && bottom > 0 ? (float) (top/bottom) : choice->d;
}

// x, divided by the largest magnitude so that squares are finite, and weights of mean 1; returns that magnitude
static float normalize(const float * x, const float * importance, int n, float * out, float * w) {
    float largest = 0, sum = 0, heaviest = 0;
    for (int i = 0; i < n; i++) {
        const float a = fabsf(x[i]);
        largest  = a > largest && a < INFINITY ? a : largest;
        heaviest = importance && importance[i] > heaviest && importance[i] < INFINITY ? importance[i] : heaviest;
    }
    for (int i = 0; i < n; i++) {
        // what is not a number counts as zero, what is infinite as the largest finite value
        out[i] = isnan(x[i]) || largest == 0 ? 0 : MAX(-1.0f, MIN(1.0f, x[i]/largest));
        w[i]   = heaviest > 0 ? (importance[i] > 0 ? MIN(1.0f, importance[i]/heaviest) : 0) : 1;
        sum   += w[i];
    }
    for (int i = 0; i < n; i++) { w[i] *= (float) n/sum; }
    return largest;
}

d2q_choice d2q_encode_block(const float * x, const float * importance, int groups, bool paired) {
    float normalized[GROUP*D2Q_MAX_GROUPS], w[GROUP*D2Q_MAX_GROUPS];
    const d2q_block block = { normalized, w, groups, paired };
    const int       n     = GROUP*groups;
    const float     size  = normalize(x, importance, n, normalized, w);

    float power = 0;
    for (int i = 0; i < n; i++) { power += w[i]*normalized[i]*normalized[i]; }
    d2q_choice best = { .d = 0 };
    float      best_error = power*0.999999f; // of all zeros, less what rounding could pretend to gain
    if (!(power > 0)) {
        return best;
    }

    float guess[COARSE_SCALES], error[COARSE_SCALES];
    for (int s = 0; s < COARSE_SCALES; s++) {
        guess[s] = sqrtf(power/(float) n)/units[paired]*0.6f*powf(4.5f/0.6f, (float) s/(COARSE_SCALES - 1));
        guess[s] = stored_scale(guess[s]*size)/size;
        error[s] = 0;
        for (int g = 0; g < groups; g++) {
            float cost[BOOKS], smallest = INFINITY;
            rank_books(&block, g, 1/guess[s], cost);
            for (int b = 0; b < BOOKS; b++) { smallest = MIN(smallest, cost[b]); }
            error[s] += smallest*guess[s]*guess[s];
        }
    }
    for (int kept = 0; kept < KEPT_SCALES; kept++) {
        int s = 0;
        for (int t = 1; t < COARSE_SCALES; t++) {
            if (error[t] < error[s]) { s = t; }
        }
        try_scale(&block, guess[s], &best, &best_error);
        error[s] = INFINITY;
    }
    const float centre = best.d;
    if (centre > 0) {
        static const float neighbours[4] = { 0.93f, 0.965f, 1.035f, 1.07f };
        for (int n = 0; n < 4; n++) {
            try_scale(&block, stored_scale(centre*size*neighbours[n])/size, &best, &best_error);
        }
        for (int round = 0; round < REFITS; round++) {
            const float before = best.d;
            try_scale(&block, stored_scale(refitted_scale(&block, &best)*size)/size, &best, &best_error);
            if (best.d == before) { break; }
        }
        choose_codes(&block, &best);
    }
    // size may not divide a fp16 number exactly: round once more to where it came from
    best.d = best.d > 0 ? stored_scale(best.d*size*(paired ? PAIR_STRETCH : 1.0f)) : 0;
    return best;
}
