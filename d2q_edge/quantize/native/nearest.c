// Finds the nearest entries of given codebooks. Counterpart of CodebookSearch.nearest.

#include "codebooks.h"

// Finds the codes of the pairs of one group: of equal ones the first.
static void nearest_pairs(const float *levels, const float *values, uint8_t *codes) {
    for (int half = 0; half < GROUP / 2; half += LANES) {
        lanes first, second, least = all(INFINITY), chosen = all(0);
        for (int i = 0; i < LANES; i++) {
            first[i] = values[2 * (half + i)];
            second[i] = values[2 * (half + i) + 1];
        }
        for (int entry = 0; entry < ENTRIES; entry++) {
            const lanes off0 = first - levels[entry], off1 = second - levels[ENTRIES + entry];
            const lanes error = off0 * off0 + off1 * off1;
            chosen = where(less(error, least), all((float)entry), chosen);
            least = smaller(error, least);
        }
        for (int i = 0; i < LANES; i++) codes[half + i] = (uint8_t)chosen[i];
    }
}

// Finds the codes on the best paths of LANES groups; the values are theirs, column by column.
static void nearest_paths(const lanes *levels, const lanes *values, lanes *codes) {
    for (int chain = 0; chain < GROUP; chain += CHAIN) {
        lanes cost[2] = {all(0), all(INFINITY)}, ways[2][CHAIN];
        for (int i = 0; i < CHAIN; i++) {
            lanes least[2] = {all(INFINITY), all(INFINITY)}, index[2] = {all(0), all(0)};
            for (int entry = 0; entry < ENTRIES; entry++) {
                const lanes off = values[chain + i] - levels[entry];
                const lanes total = off * off + cost[entry / STATE_CODES];
                const int after = entry & 1;
                index[after] = where(less(total, least[after]), all((float)entry), index[after]);
                least[after] = smaller(total, least[after]);
            }
            for (int state = 0; state < 2; state++) {
                cost[state] = least[state];
                ways[state][i] = index[state];
            }
        }
        lane_ints odd = less(cost[1], cost[0]);
        for (int i = CHAIN - 1; i >= 0; i--) {
            const lanes index = where(odd, ways[1][i], ways[0][i]);
            odd = less(all(STATE_CODES - 1), index);
            codes[chain + i] = where(odd, index - STATE_CODES, index);
        }
    }
}

// Finds the codes [32 / V] of the groups from begin to end, of values [32] in code order and codebooks.
void d2q_nearest(
    const struct codebooks *table, int64_t begin, int64_t end, const float *values, const int64_t *codebooks,
    uint8_t *codes
) {
    if (table->width == 2) {
        for (int64_t group = begin; group < end; group++) {
            const float *levels = table->levels + codebooks[group] * 2 * ENTRIES;
            nearest_pairs(levels, values + group * GROUP, codes + group * (GROUP / 2));
        }
        return;
    }
    for (int64_t group = begin; group < end; group += LANES) {
        const int groups = end - group < LANES ? (int)(end - group) : LANES;
        lanes levels[ENTRIES], columns[GROUP], found[GROUP];
        int chosen[LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t own = group + (i < groups ? i : groups - 1);
            chosen[i] = (int)codebooks[own];
            for (int j = 0; j < GROUP; j++) ((lane *)columns)[j * LANES + i] = values[own * GROUP + j];
        }
        load_levels(table, chosen, levels);
        nearest_paths(levels, columns, found);
        for (int i = 0; i < groups; i++) {
            for (int j = 0; j < GROUP; j++) codes[(group + i) * GROUP + j] = (uint8_t)((lane *)found)[j * LANES + i];
        }
    }
}
