// The d2q types in the CPU backend: dot products with 8-bit activations, Q8_K for blocks of 256, Q8_0 for blocks of 64.
// The functions without suffix are the fastest for the compiler's target; the _generic ones are their reference.
#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void quantize_row_d2q2   (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_d2q3   (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_d2q2_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_d2q3_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

#define D2Q_VEC_DOT(name) \
    void name(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc)

D2Q_VEC_DOT(ggml_vec_dot_d2q2_q8_K);
D2Q_VEC_DOT(ggml_vec_dot_d2q3_q8_K);
D2Q_VEC_DOT(ggml_vec_dot_d2q2_64_q8_0);
D2Q_VEC_DOT(ggml_vec_dot_d2q3_64_q8_0);

D2Q_VEC_DOT(ggml_vec_dot_d2q2_q8_K_generic);
D2Q_VEC_DOT(ggml_vec_dot_d2q3_q8_K_generic);
D2Q_VEC_DOT(ggml_vec_dot_d2q2_64_q8_0_generic);
D2Q_VEC_DOT(ggml_vec_dot_d2q3_64_q8_0_generic);

// makes the tables that the kernels of this target need; ggml_cpu_init calls it once, before any dot product
void d2q_cpu_init(void);

#ifdef __cplusplus
}
#endif
