// The reference encoder's search: scale, codebooks and codes of one block, by weighted squared error.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define D2Q_MAX_GROUPS 8

typedef struct {
    float   d;                         // as stored: rounded to fp16; 0 if nothing beats zeros
    uint8_t cb[D2Q_MAX_GROUPS];
    uint8_t codes[32*D2Q_MAX_GROUPS];  // group by group: 16 pairs or 32 weights
} d2q_choice;

// makes the search tables once; call before d2q_encode_block
void d2q_encode_init(void);

// x: 32*groups values, importance: as many weights of their squared errors, or NULL for ones
d2q_choice d2q_encode_block(const float * x, const float * importance, int groups, bool paired);
