/* How a warp of the portable bf16 GEMM stores its 64 x 64 of c. */
#ifndef LCTX_GEMM_STORE_CUH
#define LCTX_GEMM_STORE_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lctx/mma.cuh"

namespace lctx::cuda::gemm_detail {

using namespace lctx::warp;

/* Rows `first` + lane / 4 and those 8 further down of a warp's 64 columns of c; acc: their 16 x 64. */
__device__ __forceinline__ void store_rows(const float (&acc)[8][4], const GemmLaunch& p, void* c_base, int64_t first, int64_t column0, int64_t m) {
  const int lane = threadIdx.x % 32;
  const bool vector = p.vector_c != 0;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int64_t row = first + lane / 4 + h * 8;
    const bool row_valid = row < m;
    if (p.c_f32) {
      float* c = static_cast<float*>(c_base) + row * p.ldc;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int64_t column = column0 + j * 8 + lane % 4 * 2;
        float v0 = p.alpha * acc[j][h * 2], v1 = p.alpha * acc[j][h * 2 + 1];
        if (!row_valid) continue;
        if (vector && column + 1 < p.n) {
          float2* at = reinterpret_cast<float2*>(c + column);
          if (p.beta != 0.0f) {
            const float2 before = *at;
            v0 += p.beta * before.x;
            v1 += p.beta * before.y;
          }
          *at = make_float2(v0, v1);
        } else {
          if (column < p.n) c[column] = p.beta != 0.0f ? v0 + p.beta * c[column] : v0;
          if (column + 1 < p.n) c[column + 1] = p.beta != 0.0f ? v1 + p.beta * c[column + 1] : v1;
        }
      }
    } else {
      __nv_bfloat16* c = static_cast<__nv_bfloat16*>(c_base) + row * p.ldc;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int64_t column = column0 + (half * 4 + j) * 8 + lane % 4 * 2;
          float v0 = p.alpha * acc[half * 4 + j][h * 2], v1 = p.alpha * acc[half * 4 + j][h * 2 + 1];
          if (p.beta != 0.0f && row_valid) {
            if (column < p.n) v0 += p.beta * __bfloat162float(c[column]);
            if (column + 1 < p.n) v1 += p.beta * __bfloat162float(c[column + 1]);
          }
          packed[j] = pack(v0, v1);
        }
        transpose_quad(packed);  // every lane takes part
        const int64_t column = column0 + half * 32 + lane % 4 * 8;
        if (!row_valid || column >= p.n) continue;
        if (vector && column + 8 <= p.n) {
          *reinterpret_cast<uint4*>(c + column) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        } else {
          uint64_t low = packed[0] | static_cast<uint64_t>(packed[1]) << 32, high = packed[2] | static_cast<uint64_t>(packed[3]) << 32;
#pragma unroll 1
          for (int64_t i = column; i < p.n && i < column + 8; i++) {
            reinterpret_cast<uint16_t*>(c)[i] = static_cast<uint16_t>(low);
            low = low >> 16 | high << 48;
            high >>= 16;
          }
        }
      }
    }
  }
}

/* The warp's 64 x 64 of c. p.vector_c: c's rows and n are such that 16-byte (bf16) or 8-byte (f32) stores are aligned. */
__device__ __forceinline__ void store_warp(float (&acc)[4][8][4], const GemmLaunch& p, void* c_base, int64_t row0, int64_t column0, int64_t m) {
  const int lane = threadIdx.x % 32;
  if (p.vector_c && !p.c_f32 && p.beta == 0.0f && row0 + 64 <= m && column0 + 64 <= p.n) {
    // What nearly every tile of a large product is: no products run meanwhile, so every instruction counts.
    const int64_t below = 8 * p.ldc;
    __nv_bfloat16* c = static_cast<__nv_bfloat16*>(c_base) + (row0 + lane / 4) * p.ldc + column0 + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32_t packed[4];
#pragma unroll
          for (int j = 0; j < 4; j++) packed[j] = pack(p.alpha * acc[i][half * 4 + j][h * 2], p.alpha * acc[i][half * 4 + j][h * 2 + 1]);
          transpose_quad(packed);
          *reinterpret_cast<uint4*>(c + half * 32) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        }
        c += below;
      }
    return;
  }
  // Code for 16 rows, which moves up what is left: a quarter of the instructions, of which a cubin is mostly made.
#pragma unroll 1
  for (int i = 0; i < 4; i++) {
    store_rows(acc[0], p, c_base, row0 + i * 16, column0, m);
#pragma unroll
    for (int r = 0; r < 3; r++)
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[r][j][e] = acc[r + 1][j][e];
  }
}

}  // namespace lctx::cuda::gemm_detail
#endif
