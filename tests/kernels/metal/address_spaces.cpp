// Compiles our Metal headers with Metal's address spaces as different types, which the shim leaves out: Apple's compiler
// refuses a pointer that loses its address space. Only what the headers name is here, and only declared.

#include <stdint.h>

#define device      __attribute__((address_space(1)))
#define constant    __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define FOR_UNROLL(x) for (x)

typedef unsigned short ushort;
typedef unsigned int   uint;
typedef __fp16         half;

struct uint3  { uint x, y, z; };
struct uint4  { uint x, y, z, w; uint4(uint, uint, uint, uint); };
struct float4 { float v[4]; float4(float); float & operator[](int i) { return v[i]; } };

template <typename T>
struct matrix {
    struct column { T v[4]; T & operator[](int i) { return v[i]; } } columns[4];
    column & operator[](int i) { return columns[i]; }
};
typedef matrix<float> float4x4;
typedef matrix<half>  half4x4;

template <typename T> T min(T a, T b) { return a < b ? a : b; }
float simd_sum(float);

typedef half ggml_half;
#define QK_K       256
#define QK_D2Q_64  64
#define N_R0_D2Q   4
struct block_d2q2    { ggml_half d; uint8_t cb[8], qs[64]; };
struct block_d2q3    { ggml_half d; uint8_t cb[8], qs[64], qh[32]; };
struct block_d2q2_64 { ggml_half d; uint8_t cb[2], qs[16]; };
struct block_d2q3_64 { ggml_half d; uint8_t cb[2], qs[16], qh[8]; };

struct ggml_metal_kargs_mul_mv { int32_t ne00, ne01, ne0, ne1; uint64_t nb01, nb02, nb03, nb11, nb12, nb13; };
extern const short FC_mul_mv_nsg, FC_mul_mv_ne12, FC_mul_mv_r2, FC_mul_mv_r3;

#include "d2q-tables-metal.h"
#include "d2q-metal.h"
#include "d2q-metal-mul-mv.h"

template void dequantize_d2q2   (device const block_d2q2    *, short, thread half4x4  &);
template void dequantize_d2q2   (device const block_d2q2    *, short, thread float4x4 &);
template void dequantize_d2q3   (device const block_d2q3    *, short, thread half4x4  &);
template void dequantize_d2q3   (device const block_d2q3    *, short, thread float4x4 &);
template void dequantize_d2q2_64(device const block_d2q2_64 *, short, thread half4x4  &);
template void dequantize_d2q2_64(device const block_d2q2_64 *, short, thread float4x4 &);
template void dequantize_d2q3_64(device const block_d2q3_64 *, short, thread half4x4  &);
template void dequantize_d2q3_64(device const block_d2q3_64 *, short, thread float4x4 &);

typedef decltype(kernel_mul_mv_d2q_f32<block_d2q2, QK_K, 8>) mul_mv_d2q_t;
template kernel mul_mv_d2q_t kernel_mul_mv_d2q_f32<block_d2q2,         QK_K, 8>;
template kernel mul_mv_d2q_t kernel_mul_mv_d2q_f32<block_d2q3,         QK_K, 8>;
template kernel mul_mv_d2q_t kernel_mul_mv_d2q_f32<block_d2q2_64, QK_D2Q_64, 4>;
template kernel mul_mv_d2q_t kernel_mul_mv_d2q_f32<block_d2q3_64, QK_D2Q_64, 4>;

// as MUL_MAT_ID calls it: with the arguments by value
template void kernel_mul_mv_d2q_f32_impl<block_d2q2, QK_K, 8, N_R0_D2Q, ggml_metal_kargs_mul_mv>(
    ggml_metal_kargs_mul_mv, device const char *, device const char *, device char *, threadgroup char *, uint3, ushort, ushort);
