// Ranks all codebooks for a group by tables of squared errors, as codebook_search.py does with pairs.
//
// The values are binned, and the errors of the bins' centers are summed up in 16-bit integers. Pairs: [bins][bins][256].
// Where an entry also depends on the code before, the table has the error of the best way from each state to each, and
// the rank is the cost of the cheapest path (trellis.py): [bins][8][2][2][32], the 32 codebooks of a step side by side.

#include "codebooks.h"

enum { WORDS = 16, TOGETHER = 2 * WORDS };

typedef uint16_t words __attribute__((vector_size(2 * WORDS)));

static inline words load_words(const uint16_t *from) {
    words values;
    __builtin_memcpy(&values, from, sizeof values);
    return values;
}

static inline void store_words(uint16_t *to, words values) {
    __builtin_memcpy(to, &values, sizeof values);
}

static inline words add_saturated(words a, words b) {
#if defined(__AVX2__)
    return (words)_mm256_adds_epu16((__m256i)a, (__m256i)b);
#else
    words total = a + b;
    return total | (words)(total < a);
#endif
}

static inline words smaller_words(words a, words b) {
#if defined(__AVX2__)
    return (words)_mm256_min_epu16((__m256i)a, (__m256i)b);
#else
    words mask = (words)(a < b);
    return (mask & a) | (~mask & b);
#endif
}

static void find_bins(const struct codebooks *table, const float *values, int32_t *bins) {
    const float factor = table->bins / 2 / table->edge, middle = table->bins / 2;
    const float last = table->bins - 1;
    for (int i = 0; i < GROUP; i++) {
        float position = values[i] / (fabsf(values[i]) + table->knee) * factor + middle;
        position = position > 0 ? position : 0;
        bins[i] = (int32_t)(position < last ? position : last);
    }
}

static void rank_pairs(const struct codebooks *table, const int32_t *bins, uint16_t *ranks) {
    const uint16_t *rows[GROUP / 2];
    for (int i = 0; i < GROUP / 2; i++) {
        rows[i] = table->ranks + ((int64_t)bins[2 * i] * table->bins + bins[2 * i + 1]) * CODEBOOKS;
    }
    for (int codebook = 0; codebook < CODEBOOKS; codebook += TOGETHER) {
        words first = {0}, second = {0};
        for (int i = 0; i < GROUP / 2; i++) {
            first = add_saturated(first, load_words(rows[i] + codebook));
            second = add_saturated(second, load_words(rows[i] + codebook + WORDS));
        }
        store_words(ranks + codebook, first);
        store_words(ranks + codebook + WORDS, second);
    }
}

static void rank_paths(const struct codebooks *table, const int32_t *bins, uint16_t *ranks) {
    const words worst = ~(words){0};
    for (int codebook = 0; codebook < CODEBOOKS; codebook += TOGETHER) {
        words total[2] = {{0}};
        for (int chain = 0; chain < GROUP; chain += CHAIN) {
            words even[2] = {{0}}, odd[2] = {worst, worst};
            for (int i = chain; i < chain + CHAIN; i++) {
                const uint16_t *ways = table->ranks + ((int64_t)bins[i] * CODEBOOKS + codebook) * 4;
                for (int half = 0; half < 2; half++) {
                    const uint16_t *own = ways + half * WORDS;
                    words to_even = smaller_words(
                        add_saturated(even[half], load_words(own)),
                        add_saturated(odd[half], load_words(own + 2 * TOGETHER))
                    );
                    odd[half] = smaller_words(
                        add_saturated(even[half], load_words(own + TOGETHER)),
                        add_saturated(odd[half], load_words(own + 3 * TOGETHER))
                    );
                    even[half] = to_even;
                }
            }
            for (int half = 0; half < 2; half++) {
                total[half] = add_saturated(total[half], smaller_words(even[half], odd[half]));
            }
        }
        store_words(ranks + codebook, total[0]);
        store_words(ranks + codebook + WORDS, total[1]);
    }
}

void rank_codebooks(const struct codebooks *table, const float *values, uint16_t *ranks) {
    int32_t bins[GROUP];
    find_bins(table, values, bins);
    if (table->width == 2) {
        rank_pairs(table, bins, ranks);
    } else {
        rank_paths(table, bins, ranks);
    }
}
