// Quantizes one block of columns with error feedback. Counterpart of gptaq.quantize_block, which takes the codebook that
// is nearest to a group's weights; here several are tried, and the one with the least sum of |E|^2 is taken.

#include <string.h>

#include "codebooks.h"

// Quantizes one group of LANES rows, each with the best of its nominees.
static void quantize_best(
    const struct codebooks *table, const struct feedback *feedback, const lanes *work, int nominees[NOMINEES][LANES],
    lanes scales, struct bundle *best
) {
    lanes least = all(INFINITY);
    for (int n = 0; n < NOMINEES; n++) {
        struct bundle trial = {0};
        lanes loss = all(0);
        memcpy(trial.work, work, sizeof trial.work);
        quantize_group(table, feedback, nominees[n], scales, &trial);
        for (int i = 0; i < GROUP; i++) loss += trial.errors[i] * trial.errors[i];
        if (n == 0) *best = trial;
        take_better(best, less(loss, least), &trial);
        least = smaller(loss, least);
    }
}

// All arrays are those of gptaq.quantize_block, for all rows; `work` is the weights and becomes those w as they were
// quantized. The rows from begin to end are done.
void d2q_quantize_block(
    const struct codebooks *table, int64_t begin, int64_t end, float *work, const float *U, const float *P,
    const float *inverse, float *scales, uint8_t *codebooks, uint8_t *codes, float *quantized, float *errors
) {
    const int size = table->groups * GROUP, per_group = GROUP / table->width;
    lanes block[MAX_BLOCK];
    lane *flat = (lane *)block;
    for (int64_t row = begin; row < end; row += LANES) {
        const int rows = end - row < LANES ? (int)(end - row) : LANES;
        lanes scale = all(1);
        for (int i = 0; i < LANES; i++) {
            // Where there are fewer rows, the last one several times.
            const float *own = work + (row + (i < rows ? i : rows - 1)) * size;
            if (i < rows) scales[row + i] = block_scale(table, own);
            scale[i] = scales[row + (i < rows ? i : rows - 1)];
            for (int column = 0; column < size; column++) flat[column * LANES + i] = own[column];
        }
        for (int number = 0; number < table->groups; number++) {
            const int first = number * GROUP, stop = first + GROUP;
            int nominees[NOMINEES][LANES];
            for (int i = 0; i < LANES; i++) {
                float values[GROUP];
                int own[NOMINEES];
                for (int j = 0; j < GROUP; j++) values[j] = flat[(first + j) * LANES + i] / scale[i];
                if (i < rows) nominate(table, values, own);
                for (int n = 0; n < NOMINEES; n++) nominees[n][i] = i < rows ? own[n] : nominees[n][0];
            }
            const int64_t corner = (int64_t)first * size + first;
            const struct feedback feedback = {
                U + corner, P ? P + corner : 0, size, inverse + number * per_group * table->width * table->width
            };
            struct bundle group;
            quantize_best(table, &feedback, block + first, nominees, scale, &group);
            memcpy(block + first, group.work, sizeof group.work);
            add_product(block + stop, -1, group.errors, feedback.U + GROUP, size, GROUP, size - stop);
            if (P) add_product(block + stop, 1, group.work, feedback.P + GROUP, size, GROUP, size - stop);
            for (int i = 0; i < rows; i++) {
                const int64_t place = (row + i) * size + first;
                for (int j = 0; j < GROUP; j++) {
                    work[place + j] = ((lane *)group.work)[j * LANES + i];
                    quantized[place + j] = ((lane *)group.quantized)[j * LANES + i];
                    errors[place + j] = ((lane *)group.errors)[j * LANES + i];
                }
                codebooks[(row + i) * table->groups + number] = (uint8_t)group.codebook[i];
                for (int j = 0; j < per_group; j++) {
                    codes[((row + i) * table->groups + number) * per_group + j]
                        = (uint8_t)((lane *)group.codes)[j * LANES + i];
                }
            }
        }
    }
}
