// The d2q types in libggml-base: dequantize, the reference encoder without calibration, the tables' checksum.
#pragma once

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// y[i] = (float) d * (float) entry, exactly
GGML_API void dequantize_row_d2q2   (const block_d2q2    * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_d2q3   (const block_d2q3    * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_d2q2_64(const block_d2q2_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_d2q3_64(const block_d2q3_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// least squared error, every weight counted the same
GGML_API void quantize_row_d2q2_ref   (const float * GGML_RESTRICT x, block_d2q2    * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_d2q3_ref   (const float * GGML_RESTRICT x, block_d2q3    * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_d2q2_64_ref(const float * GGML_RESTRICT x, block_d2q2_64 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_d2q3_64_ref(const float * GGML_RESTRICT x, block_d2q3_64 * GGML_RESTRICT y, int64_t k);

// least squared error weighted by imatrix (n_per_row values, or NULL); returns the bytes written
GGML_API size_t quantize_d2q2   (const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_d2q3   (const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_d2q2_64(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_d2q3_64(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif
