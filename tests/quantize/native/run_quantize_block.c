// Runs d2q_quantize_block on what is in a file: `run_quantize_block IN OUT ROWS`; test_arm.py says what IN and OUT have.

#include <stdio.h>
#include <stdlib.h>

#include "codebooks.h"

void d2q_quantize_block(
    const struct codebooks *table, int64_t begin, int64_t end, float *work, const float *U, const float *P,
    const float *inverse, float *scales, uint8_t *codebooks, uint8_t *codes, float *quantized, float *errors
);

static void *read_array(FILE *file, size_t bytes) {
    void *array = malloc(bytes);
    if (!array || fread(array, 1, bytes, file) != bytes) exit(1);
    return array;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    FILE *in = fopen(arguments[1], "rb"), *out = fopen(arguments[2], "wb");
    const size_t rows = (size_t)atoi(arguments[3]);
    struct codebooks table;
    if (!in || !out || fread(&table, sizeof table, 1, in) != 1) return 1;
    const size_t size = (size_t)table.groups * GROUP, bins = (size_t)table.bins;
    table.levels = read_array(in, (size_t)table.width * CODEBOOKS * ENTRIES * sizeof(float));
    table.ranks = read_array(in, (table.width == 2 ? bins * bins : 4 * bins) * CODEBOOKS * sizeof(uint16_t));
    table.step_ends = read_array(in, (size_t)table.parts * sizeof(int32_t));
    table.steps = read_array(in, (size_t)table.step_ends[table.parts - 1] * sizeof(float));
    float *work = read_array(in, rows * size * sizeof(float));
    const float *U = read_array(in, size * size * sizeof(float)), *P = read_array(in, size * size * sizeof(float));
    const float *inverse = read_array(in, size * (size_t)table.width * sizeof(float));
    float *scales = calloc(rows, sizeof(float));
    float *quantized = calloc(rows * size, sizeof(float)), *errors = calloc(rows * size, sizeof(float));
    uint8_t *codebooks = calloc(rows, (size_t)table.groups), *codes = calloc(rows, size);
    d2q_quantize_block(
        &table, 0, (int64_t)rows, work, U, P, inverse, scales, codebooks, codes, quantized, errors
    );
    fwrite(scales, sizeof(float), rows, out);
    fwrite(codebooks, (size_t)table.groups, rows, out);
    fwrite(codes, size / (size_t)table.width, rows, out);
    fwrite(quantized, sizeof(float), rows * size, out);
    fwrite(errors, sizeof(float), rows * size, out);
    fwrite(work, sizeof(float), rows * size, out);
    return fclose(out);
}
