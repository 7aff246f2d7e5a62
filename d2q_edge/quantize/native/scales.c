// Chooses block scales by the lowest ranks at some trial scales. Counterpart of CodebookSearch.block_scales.

#include "codebooks.h"

static const float SCALE_MAX = 65504.0f, SCALE_TINY = 0x1p-24f;

// Rounds a positive scale to what a block can store: float16, neither zero nor infinite.
static float stored_scale(float scale) {
    scale = fminf(fmaxf(scale, SCALE_TINY), SCALE_MAX);
    if (scale < 0x1p-14f) {
        // Subnormal: a multiple of the smallest number.
        return rintf(scale / SCALE_TINY) * SCALE_TINY;
    }
    uint32_t bits;
    __builtin_memcpy(&bits, &scale, sizeof bits);
    // To nearest, ties to even, at 10 of 23 fraction bits.
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~UINT32_C(0x1fff);
    __builtin_memcpy(&scale, &bits, sizeof bits);
    return scale;
}

// Returns the approximate squared error of a block at a scale, with the best codebook for each group.
static float approximate_error(const struct codebooks *table, const float *weights, float scale) {
    const float nearest = (table->reach - table->largest) * (table->reach - table->largest);
    float total = 0;
    for (int group = 0; group < table->groups; group++) {
        float values[GROUP], beyond[GROUP], error = 0;
        uint16_t ranks[CODEBOOKS], least = WORST_RANK;
        for (int i = 0; i < GROUP; i++) {
            values[i] = weights[group * GROUP + i] / scale;
            // The table ends at `reach`; beyond it the error grows with the distance from the largest entry.
            const float size = fabsf(values[i]), off = size - table->largest;
            beyond[i] = size > table->reach ? off * off - nearest : 0;
        }
        rank_codebooks(table, values, ranks);
        for (int i = 0; i < CODEBOOKS; i++) least = ranks[i] < least ? ranks[i] : least;
        for (int i = 0; i < GROUP; i++) error += beyond[i];
        total += error + (least == WORST_RANK ? INFINITY : (float)least / RANKS_PER_UNIT);
    }
    return scale * scale * total;
}

float block_scale(const struct codebooks *table, const float *weights) {
    const int size = table->groups * GROUP;
    double power = 0;
    for (int i = 0; i < size; i++) power += (double)weights[i] * weights[i];
    float scale = stored_scale((float)sqrt(power / size) / table->unit), best = INFINITY;
    for (int part = 0, step = 0; part < table->parts; part++) {
        const float center = scale;
        for (; step < table->step_ends[part]; step++) {
            const float trial = stored_scale(center * table->steps[step]);
            const float error = approximate_error(table, weights, trial);
            if (error < best) {
                best = error;
                scale = trial;
            }
        }
    }
    return scale;
}

// Chooses the scales of blocks [end - begin] of weights in code order.
void d2q_block_scales(
    const struct codebooks *table, int64_t begin, int64_t end, const float *weights, float *scales
) {
    for (int64_t block = begin; block < end; block++) {
        scales[block] = block_scale(table, weights + block * table->groups * GROUP);
    }
}
