// Chooses the groups of one block of columns again. Counterpart of descent.choose_block, which tries the codebook that is
// nearest to a group's optimum; here several are tried.

#include "codebooks.h"

// Returns where a column of the order of quantization is stored: those of a code are side by side while quantized.
static inline int stored(const struct codebooks *table, int column) {
    return column % table->width * (GROUP / table->width) + column / table->width;
}

// Returns off H off^T of every row.
static lanes weighted(const lanes *off, const float *hessian, int64_t stride) {
    lanes seen[GROUP] = {{0}}, total = all(0);
    add_product(seen, 1, off, hessian, stride, GROUP, GROUP);
    for (int i = 0; i < GROUP; i++) total += seen[i] * off[i];
    return total;
}

// Chooses one group again.
//
// `target` are the optima, in storage order; `error` is the objective of the present units. `best` has these units as
// its quantized weights, in the order of quantization, with their codebooks and codes.
static void choose_group(
    const struct codebooks *table, const struct feedback *feedback, const float *hessian, int64_t stride,
    const lanes *target, lanes error, struct bundle *best
) {
    int candidates[1 + NOMINEES][LANES];
    for (int i = 0; i < LANES; i++) {
        float values[GROUP];
        int nominees[NOMINEES];
        for (int j = 0; j < GROUP; j++) values[j] = ((lane *)target)[stored(table, j) * LANES + i];
        nominate(table, values, nominees);
        candidates[0][i] = (int)best->codebook[i];
        for (int n = 0; n < NOMINEES; n++) candidates[1 + n][i] = nominees[n];
    }
    // The present codebook first; each is taken only where it is better.
    for (int n = 0; n < 1 + NOMINEES; n++) {
        struct bundle trial = {0};
        lanes off[GROUP];
        for (int j = 0; j < GROUP; j++) trial.work[j] = target[stored(table, j)];
        quantize_group(table, feedback, candidates[n], all(1), &trial);
        for (int j = 0; j < GROUP; j++) off[stored(table, j)] = trial.quantized[j] - target[stored(table, j)];
        const lanes found = weighted(off, hessian, stride);
        take_better(best, less(found, error), &trial);
        error = smaller(found, error);
    }
}

// All arrays are those of descent.choose_block, for all rows; `gradient` is not changed, the choices are in place. The
// rows from begin to end are done.
void d2q_choose_block(
    const struct codebooks *table, int64_t begin, int64_t end, const float *gradient, float *units, uint8_t *codebooks,
    uint8_t *codes, const float *hessian, const float *inverse_hessian, const float *U, const float *inverse
) {
    const int size = table->groups * GROUP, per_group = GROUP / table->width;
    lanes slope[MAX_BLOCK];
    for (int64_t row = begin; row < end; row += LANES) {
        const int rows = end - row < LANES ? (int)(end - row) : LANES;
        for (int i = 0; i < LANES; i++) {
            const float *own = gradient + (row + (i < rows ? i : rows - 1)) * size;
            for (int column = 0; column < size; column++) ((lane *)slope)[column * LANES + i] = own[column];
        }
        for (int number = 0; number < table->groups; number++) {
            const int first = number * GROUP, stop = first + GROUP;
            struct bundle choice = {0};
            lanes before[GROUP], step[GROUP] = {{0}}, target[GROUP], moved[GROUP];
            for (int i = 0; i < LANES; i++) {
                const int64_t own = row + (i < rows ? i : rows - 1), place = own * table->groups + number;
                for (int j = 0; j < GROUP; j++) ((lane *)before)[j * LANES + i] = units[own * size + first + j];
                for (int j = 0; j < per_group; j++) ((lane *)choice.codes)[j * LANES + i] = codes[place * per_group + j];
                choice.codebook[i] = codebooks[place];
            }
            add_product(step, 1, slope + first, inverse_hessian + number * GROUP * GROUP, GROUP, GROUP, GROUP);
            for (int j = 0; j < GROUP; j++) {
                target[j] = before[j] - step[j];
                choice.quantized[j] = before[stored(table, j)];
            }
            const float *corner = hessian + (int64_t)first * size + first;
            const struct feedback feedback = {
                U + number * GROUP * GROUP, 0, GROUP, inverse + number * per_group * table->width * table->width
            };
            choose_group(table, &feedback, corner, size, target, weighted(step, corner, size), &choice);
            for (int j = 0; j < GROUP; j++) moved[stored(table, j)] = choice.quantized[j] - before[stored(table, j)];
            add_product(slope + stop, 1, moved, corner + GROUP, size, GROUP, size - stop);
            for (int i = 0; i < rows; i++) {
                const int64_t place = (row + i) * table->groups + number;
                float *own = units + (row + i) * size + first;
                for (int j = 0; j < GROUP; j++) own[stored(table, j)] = ((lane *)choice.quantized)[j * LANES + i];
                for (int j = 0; j < per_group; j++) {
                    codes[place * per_group + j] = (uint8_t)((lane *)choice.codes)[j * LANES + i];
                }
                codebooks[place] = (uint8_t)choice.codebook[i];
            }
        }
    }
}
