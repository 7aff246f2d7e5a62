// Finds the best codebook of a group: the best by rank are measured exactly. Counterpart of CodebookSearch.search.

#include "codebooks.h"

// Returns the squared error of pairs in a codebook; the values are split into first and second components.
static float pairs_error(const float *levels, const lanes *first, const lanes *second) {
    lanes least[2] = {all(INFINITY), all(INFINITY)};
    for (int entry = 0; entry < ENTRIES; entry++) {
        for (int half = 0; half < 2; half++) {
            lanes off0 = first[half] - levels[entry], off1 = second[half] - levels[ENTRIES + entry];
            least[half] = smaller(least[half], off0 * off0 + off1 * off1);
        }
    }
    return sum(least[0] + least[1]);
}

// Returns the squared errors of the best paths in LANES codebooks (trellis.py).
static lanes path_errors(const lanes *levels, const float *values) {
    lanes total = all(0);
    for (int chain = 0; chain < GROUP; chain += CHAIN) {
        lanes cost[2] = {all(0), all(INFINITY)};
        for (int i = chain; i < chain + CHAIN; i++) {
            lanes next[2] = {all(INFINITY), all(INFINITY)};
            for (int state = 0; state < 2; state++) {
                lanes least[2] = {all(INFINITY), all(INFINITY)};
                for (int code = 0; code < STATE_CODES; code++) {
                    lanes off = values[i] - levels[state * STATE_CODES + code];
                    least[code & 1] = smaller(least[code & 1], off * off);
                }
                for (int after = 0; after < 2; after++) {
                    next[after] = smaller(next[after], cost[state] + least[after]);
                }
            }
            cost[0] = next[0];
            cost[1] = next[1];
        }
        total += smaller(cost[0], cost[1]);
    }
    return total;
}

void load_levels(const struct codebooks *table, const int *chosen, lanes *levels) {
    lane *flat = (lane *)levels;
    const int count = table->width * ENTRIES;
    for (int row = 0; row < LANES; row++) {
        const float *own = table->levels + chosen[row] * count;
        for (int entry = 0; entry < count; entry++) flat[entry * LANES + row] = own[entry];
    }
}

// Writes the squared errors of the values in LANES codebooks.
static void exact_errors(const struct codebooks *table, const float *values, const int *chosen, float *errors) {
    if (table->width == 1) {
        lanes levels[ENTRIES];
        load_levels(table, chosen, levels);
        lanes found = path_errors(levels, values);
        __builtin_memcpy(errors, &found, sizeof found);
        return;
    }
    float split[2][GROUP / 2];
    for (int i = 0; i < GROUP; i++) split[i % 2][i / 2] = values[i];
    lanes first[2] = {load(split[0]), load(split[0] + LANES)}, second[2] = {load(split[1]), load(split[1] + LANES)};
    for (int i = 0; i < LANES; i++) {
        errors[i] = pairs_error(table->levels + chosen[i] * 2 * ENTRIES, first, second);
    }
}

static int32_t least_key(const lane_ints *keys) {
    lane_ints least[4] = {keys[0], keys[1], keys[2], keys[3]};
    for (int i = 4; i < CODEBOOKS / LANES; i++) least[i % 4] = smaller_ints(least[i % 4], keys[i]);
    least[0] = smaller_ints(smaller_ints(least[0], least[1]), smaller_ints(least[2], least[3]));
    int32_t result = INT32_MAX;
    for (int i = 0; i < LANES; i++) result = least[0][i] < result ? least[0][i] : result;
    return result;
}

// Writes the best codebooks by rank, the best first; returns how many: fewer than wanted where ranks don't tell.
static int make_shortlist(const struct codebooks *table, const float *values, int wanted, int *chosen) {
    uint16_t ranks[CODEBOOKS];
    lane_ints keys[CODEBOOKS / LANES];
    rank_codebooks(table, values, ranks);
    // Of equal ranks the first.
    for (int i = 0; i < CODEBOOKS; i++) ((lane_int *)keys)[i] = ranks[i] * CODEBOOKS + i;
    for (int count = 0; count < wanted; count++) {
        const int32_t least = least_key(keys);
        if (least / CODEBOOKS == WORST_RANK) return count;
        chosen[count] = least % CODEBOOKS;
        ((lane_int *)keys)[least % CODEBOOKS] = INT32_MAX;
    }
    return wanted;
}

int best_codebook(const struct codebooks *table, const float *values, float *error) {
    int chosen[CODEBOOKS], count = 0;
    if (table->shortlist < CODEBOOKS) count = make_shortlist(table, values, table->shortlist, chosen);
    if (count == 0) {
        for (; count < CODEBOOKS; count++) chosen[count] = count;
    }
    // Whole vectors.
    for (; count % LANES; count++) chosen[count] = chosen[0];
    int best = chosen[0];
    *error = INFINITY;
    for (int start = 0; start < count; start += LANES) {
        float errors[LANES];
        exact_errors(table, values, chosen + start, errors);
        for (int i = 0; i < LANES; i++) {
            if (errors[i] < *error) {
                *error = errors[i];
                best = chosen[start + i];
            }
        }
    }
    return best;
}

void nominate(const struct codebooks *table, const float *values, int *chosen) {
    int count = make_shortlist(table, values, NOMINEES, chosen);
    if (count == 0) {
        float unused;
        chosen[count++] = best_codebook(table, values, &unused);
    }
    for (; count < NOMINEES; count++) chosen[count] = chosen[0];
}

// Finds the codebooks [end - begin] and errors of groups of values [32] in code order.
void d2q_search(
    const struct codebooks *table, int64_t begin, int64_t end, const float *values, int64_t *codebooks, float *errors
) {
    for (int64_t group = begin; group < end; group++) {
        codebooks[group] = best_codebook(table, values + group * GROUP, errors + group);
    }
}
