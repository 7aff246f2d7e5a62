// The codebooks of one tensor type, and what the kernels do with one group of 32 weights.

#ifndef D2Q_CODEBOOKS_H
#define D2Q_CODEBOOKS_H

#include "lanes.h"

enum { GROUP = 32, CHAIN = 16, ENTRIES = 16, STATE_CODES = 8, CODEBOOKS = 256, MAX_BLOCK = 256 };

// As the class Tables of tables.py has it.
struct codebooks {
    int32_t width;             // V, weights per code: 2, or 1 where an entry also depends on the code before
    int32_t groups;            // per block
    int32_t bins;              // of the rank table, per weight
    int32_t shortlist;         // codebooks per group that are measured exactly
    float knee, edge, reach;   // of the bins (codebook_search.py)
    float largest;             // magnitude of an entry
    float unit;                // RMS of the entries of the median codebook
    const float *levels;       // [256][V][16]
    const uint16_t *ranks;     // see rank.c
    const float *steps;        // block scales that are tried, multiples of the best so far ...
    const int32_t *step_ends;  // ... when a part of them began; where the parts end
    int32_t parts;
};

// A rank this large stands for all larger ones.
enum { WORST_RANK = UINT16_MAX, RANKS_PER_UNIT = 4 };

// Ranks all codebooks for the values [32], in units of d and in code order.
void rank_codebooks(const struct codebooks *table, const float *values, uint16_t *ranks);

// Finds the best codebook for the values [32], in units of d and in code order, and its squared error.
int best_codebook(const struct codebooks *table, const float *values, float *error);

// Codebooks per group that are tried with error feedback. With 16 the error of a layer's output is the same, with 4 it
// is 0.1 to 1 % larger, with the one that is nearest to the weights 1 to 7 % (layers of SmolLM2).
enum { NOMINEES = 8 };

// Finds the codebooks [NOMINEES] with the best ranks for the values [32], in units of d and in code order.
void nominate(const struct codebooks *table, const float *values, int *chosen);

// Chooses the scale d of one block of weights in code order.
float block_scale(const struct codebooks *table, const float *weights);

// What error feedback inside a group needs: of its columns, in the order of quantization.
struct feedback {
    const float *U, *P;    // [32][32], rows `stride` apart; P may be NULL
    int64_t stride;
    const float *inverse;  // inv(U_jj) of every code, [32 / V][V][V]
};

// One group of some rows while it is quantized.
struct bundle {
    lanes work[GROUP];  // the weights; afterwards, as they were quantized
    lanes codes[GROUP];
    lanes quantized[GROUP];
    lanes errors[GROUP];
    lanes codebook;
};

// Quantizes one group of LANES rows with the codebooks chosen, whose entries are multiplied by the scales.
void quantize_group(
    const struct codebooks *table, const struct feedback *feedback, const int *chosen, lanes scales, struct bundle *group
);

// Takes the rows of another bundle where they are better.
void take_better(struct bundle *best, lane_ints better, const struct bundle *other);

// Copies the entries [V * 16] of each row's codebook.
void load_levels(const struct codebooks *table, const int *chosen, lanes *levels);

#endif
