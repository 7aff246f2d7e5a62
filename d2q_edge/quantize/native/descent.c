// Chooses the groups of one block of columns again. Counterpart of descent.choose_block.

#include "codebooks.h"

// Returns off H off^T of every row.
static lanes weighted(const lanes *off, const float *hessian, int64_t stride) {
    lanes seen[GROUP] = {{0}}, total = all(0);
    add_product(seen, 1, off, hessian, stride, GROUP, GROUP);
    for (int i = 0; i < GROUP; i++) total += seen[i] * off[i];
    return total;
}

// One group of LANES rows: units, codebooks and codes, as they are and as they become.
struct choice {
    lanes units[GROUP], codes[GROUP], codebook;
};

// Chooses one group again; `target` are the optima, `error` the objective of the present units.
static void choose_group(
    const struct codebooks *table, const struct feedback *feedback, const float *hessian, int64_t stride,
    const lanes *target, lanes error, struct choice *choice
) {
    const int width = table->width, per_group = GROUP / width;
    int candidates[2][LANES];
    for (int i = 0; i < LANES; i++) {
        float values[GROUP], unused;
        for (int j = 0; j < GROUP; j++) values[j] = ((lane *)target)[(j % width * per_group + j / width) * LANES + i];
        candidates[0][i] = (int)choice->codebook[i];
        candidates[1][i] = best_codebook(table, values, &unused);
    }
    // The present codebook first, then the nearest one; each is taken only where it is better.
    for (int turn = 0; turn < 2; turn++) {
        struct bundle group;
        lanes rounded[GROUP], off[GROUP], codebook = all(0);
        for (int j = 0; j < GROUP; j++) group.work[j] = target[j % width * per_group + j / width];
        quantize_group(table, feedback, candidates[turn], all(1), &group);
        for (int j = 0; j < GROUP; j++) {
            const int stored = j % width * per_group + j / width;
            rounded[stored] = group.quantized[j];
            off[stored] = group.quantized[j] - target[stored];
        }
        const lanes found = weighted(off, hessian, stride);
        const lane_ints better = less(found, error);
        error = smaller(found, error);
        for (int i = 0; i < LANES; i++) codebook[i] = (float)candidates[turn][i];
        choice->codebook = where(better, codebook, choice->codebook);
        for (int j = 0; j < GROUP; j++) choice->units[j] = where(better, rounded[j], choice->units[j]);
        for (int j = 0; j < per_group; j++) choice->codes[j] = where(better, group.codes[j], choice->codes[j]);
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
            struct choice choice;
            lanes before[GROUP], step[GROUP] = {{0}}, target[GROUP];
            for (int i = 0; i < LANES; i++) {
                const int64_t own = row + (i < rows ? i : rows - 1), place = own * table->groups + number;
                for (int j = 0; j < GROUP; j++) ((lane *)before)[j * LANES + i] = units[own * size + first + j];
                for (int j = 0; j < per_group; j++) ((lane *)choice.codes)[j * LANES + i] = codes[place * per_group + j];
                choice.codebook[i] = codebooks[place];
            }
            add_product(step, 1, slope + first, inverse_hessian + number * GROUP * GROUP, GROUP, GROUP, GROUP);
            for (int j = 0; j < GROUP; j++) {
                target[j] = before[j] - step[j];
                choice.units[j] = before[j];
            }
            const float *corner = hessian + (int64_t)first * size + first;
            const struct feedback feedback = {
                U + number * GROUP * GROUP, 0, GROUP, inverse + number * per_group * table->width * table->width
            };
            choose_group(table, &feedback, corner, size, target, weighted(step, corner, size), &choice);
            lanes moved[GROUP];
            for (int j = 0; j < GROUP; j++) moved[j] = choice.units[j] - before[j];
            add_product(slope + stop, 1, moved, corner + GROUP, size, GROUP, size - stop);
            for (int i = 0; i < rows; i++) {
                const int64_t place = (row + i) * table->groups + number;
                for (int j = 0; j < GROUP; j++) units[(row + i) * size + first + j] = ((lane *)choice.units)[j * LANES + i];
                for (int j = 0; j < per_group; j++) {
                    codes[place * per_group + j] = (uint8_t)((lane *)choice.codes)[j * LANES + i];
                }
                codebooks[place] = (uint8_t)choice.codebook[i];
            }
        }
    }
}
