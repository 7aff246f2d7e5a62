// Feeds back errors inside a group, for LANES rows at once. Counterpart of feedback.quantize_group, which says how.

#include "codebooks.h"

// Updates the columns after `first` by the errors of `count` columns from there on, and by their weights through P.
static inline __attribute__((always_inline)) void update_later(
    const struct feedback *feedback, int first, int count, const lanes *errors, const lanes *seen, lanes *work, int stop
) {
    for (int column = first + count; column < stop; column++) {
        lanes value = work[column];
        for (int j = 0; j < count; j++) value -= errors[j] * feedback->U[(first + j) * feedback->stride + column];
        if (feedback->P) {
            for (int j = 0; j < count; j++) value += seen[j] * feedback->P[(first + j) * feedback->stride + column];
        }
        work[column] = value;
    }
}

static void quantize_pairs(const struct feedback *feedback, const lanes *levels, struct bundle *group) {
    for (int code = 0; code < GROUP / 2; code++) {
        const int first = 2 * code;
        const lanes w[2] = {group->work[first], group->work[first + 1]};
        const float *inverse = feedback->inverse + 4 * code;
        lanes least = all(INFINITY), chosen = all(0), q[2] = {all(0), all(0)};
        for (int entry = 0; entry < ENTRIES; entry++) {
            const lanes level[2] = {levels[entry], levels[ENTRIES + entry]};
            const lanes off[2] = {w[0] - level[0], w[1] - level[1]};
            // inv(U_jj) is upper triangular.
            const lanes lost[2] = {off[0] * inverse[0], off[0] * inverse[1] + off[1] * inverse[3]};
            const lanes cost = lost[0] * lost[0] + lost[1] * lost[1];
            const lane_ints better = less(cost, least);
            least = smaller(cost, least);
            chosen = where(better, all((float)entry), chosen);
            for (int j = 0; j < 2; j++) q[j] = where(better, level[j], q[j]);
        }
        lanes *errors = group->errors + first;
        errors[0] = (w[0] - q[0]) * inverse[0];
        errors[1] = (w[0] - q[0]) * inverse[1] + (w[1] - q[1]) * inverse[3];
        group->codes[code] = chosen;
        for (int j = 0; j < 2; j++) group->quantized[first + j] = q[j];
        update_later(feedback, first, 2, errors, w, group->work, GROUP);
    }
}

// One way into a state: of all ways so far the cheapest.
struct way {
    lanes cost, index, level;
};

// Quantizes one chain of columns: the cheapest path into each state survives, with its own weights.
static void quantize_chain(
    const struct feedback *feedback, const lanes *levels, int first, struct bundle *group
) {
    lanes work[2][CHAIN], seen[2][CHAIN];
    struct way ways[2][CHAIN];
    lanes cost[2] = {all(0), all(INFINITY)};
    for (int i = 0; i < CHAIN; i++) work[0][i] = work[1][i] = group->work[first + i];
    for (int i = 0; i < CHAIN; i++) {
        const int column = first + i;
        const float inverse = feedback->inverse[column];
        const lanes w[2] = {work[0][i], work[1][i]};
        struct way next[2] = {{all(INFINITY), all(0), all(0)}, {all(INFINITY), all(0), all(0)}};
        for (int entry = 0; entry < ENTRIES; entry++) {
            const int before = entry / STATE_CODES;
            struct way *into = &next[entry & 1];
            const lanes lost = (w[before] - levels[entry]) * inverse, total = lost * lost + cost[before];
            const lane_ints better = less(total, into->cost);
            into->cost = smaller(total, into->cost);
            into->index = where(better, all((float)entry), into->index);
            into->level = where(better, levels[entry], into->level);
        }
        lane_ints second[2];
        lanes errors[2];
        for (int state = 0; state < 2; state++) {
            second[state] = less(all(STATE_CODES - 1), next[state].index);
            seen[state][i] = where(second[state], w[1], w[0]);
            errors[state] = (seen[state][i] - next[state].level) * inverse;
            ways[state][i] = next[state];
            cost[state] = next[state].cost;
        }
        const float *row_U = feedback->U + column * feedback->stride + first;
        const float *row_P = feedback->P ? feedback->P + column * feedback->stride + first : 0;
        for (int later = i + 1; later < CHAIN; later++) {
            const lanes own[2] = {work[0][later], work[1][later]};
            for (int state = 0; state < 2; state++) {
                lanes value = where(second[state], own[1], own[0]) - errors[state] * row_U[later];
                if (row_P) value += seen[state][i] * row_P[later];
                work[state][later] = value;
            }
        }
    }
    // From the end of the cheaper path back to its beginning.
    lane_ints odd = less(cost[1], cost[0]);
    for (int i = CHAIN - 1; i >= 0; i--) {
        const int column = first + i;
        const lanes index = where(odd, ways[1][i].index, ways[0][i].index);
        const lanes level = where(odd, ways[1][i].level, ways[0][i].level);
        const lanes w = where(odd, seen[1][i], seen[0][i]);
        odd = less(all(STATE_CODES - 1), index);
        group->codes[column] = where(odd, index - STATE_CODES, index);
        group->quantized[column] = level;
        group->errors[column] = (w - level) * feedback->inverse[column];
        group->work[column] = w;
    }
}

void quantize_group(
    const struct codebooks *table, const struct feedback *feedback, const int *chosen, lanes scales, struct bundle *group
) {
    lanes levels[2 * ENTRIES];
    for (int i = 0; i < LANES; i++) group->codebook[i] = (float)chosen[i];
    load_levels(table, chosen, levels);
    for (int entry = 0; entry < table->width * ENTRIES; entry++) levels[entry] *= scales;
    if (table->width == 2) {
        quantize_pairs(feedback, levels, group);
        return;
    }
    for (int first = 0; first < GROUP; first += CHAIN) {
        quantize_chain(feedback, levels, first, group);
        const int64_t corner = first * feedback->stride + first + CHAIN;
        const int later = GROUP - first - CHAIN;
        lanes *rest = group->work + first + CHAIN;
        add_product(rest, -1, group->errors + first, feedback->U + corner, feedback->stride, CHAIN, later);
        if (feedback->P) {
            add_product(rest, 1, group->work + first, feedback->P + corner, feedback->stride, CHAIN, later);
        }
    }
}

void take_better(struct bundle *best, lane_ints better, const struct bundle *other) {
    for (int i = 0; i < GROUP; i++) {
        best->work[i] = where(better, other->work[i], best->work[i]);
        best->codes[i] = where(better, other->codes[i], best->codes[i]);
        best->quantized[i] = where(better, other->quantized[i], best->quantized[i]);
        best->errors[i] = where(better, other->errors[i], best->errors[i]);
    }
    best->codebook = where(better, other->codebook, best->codebook);
}
