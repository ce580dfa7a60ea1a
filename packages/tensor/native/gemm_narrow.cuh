/* Products that are narrow on one side, as LoRA's and a router's are: bf16 or f32 by f32 on tensor cores, in f32's accuracy.
 *
 * An f32 is the sum of three bf16 (8 bits of significand each): high, middle and low part. A product with a bf16 takes three tensor-core products, each exact, and one of
 * two f32 takes six: those left out are below 2^-26 of it. Tensor cores add with truncation, so their sums are kept short: what 16 or 32 of k give is added
 * to the sum in registers by an ordinary f32 addition. Infinities among the f32 operands become NaN.
 *
 * The order of k within a step is permuted, alike in both operands, such that each lane's fragment is 16 neighbouring bytes in memory: operands go from memory to registers. */
#ifndef LCTX_GEMM_NARROW_CUH
#define LCTX_GEMM_NARROW_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "gemm_tiles.cuh"
#include "lctx/mma.cuh"

namespace lctx::cuda::narrow {

constexpr int WARPS = 8, THREADS = WARPS * 32;

using warp::mma, warp::pack;

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

/* Two neighbouring f32 as three pairs of bf16, the largest part first. */
__device__ __forceinline__ void split(float x, float y, uint32_t (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    parts[i] = pack(x, y);
    x -= low_half(parts[i]);
    y -= high_half(parts[i]);
  }
}

/* Eight neighbouring bf16, of which `valid` exist. VECTOR: all or none of them, on 16 bytes. */
template <bool VECTOR>
__device__ __forceinline__ uint4 load8(const __nv_bfloat16* at, int64_t valid) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if constexpr (VECTOR) {
    // Read once: kept out of L1, where the narrow operand is to stay.
    if (valid > 0) asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  } else {
    uint32_t* words = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < valid) words[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(at)[i]) << (i % 2 * 16);
  }
  return v;
}

/* Adds up the sums of the block's warps: afterwards warp 0 holds the total. The order is fixed. `scratch`: warps / 2 * 32 * N floats. */
template <int N, int COUNT = WARPS>
__device__ __forceinline__ void add_warps(float* sums, float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = COUNT / 2; half; half /= 2) {
    if (warp >= half && warp < 2 * half)
#pragma unroll
      for (int i = 0; i < N; i++) scratch[((warp - half) * N + i) * 32 + lane] = sums[i];
    __syncthreads();
    if (warp < half)
#pragma unroll
      for (int i = 0; i < N; i++) sums[i] += scratch[(warp * N + i) * 32 + lane];
    if (half > 1) __syncthreads();
  }
}

inline bool aligned(const void* p, int64_t ld, int64_t stride, int64_t elements) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld % elements == 0 && stride % elements == 0;
}

/* Which of them a product is; each launcher takes only its own. */
int launch_rows(const GemmLaunch& p, cudaStream_t s);
int launch_update(const GemmLaunch& p, cudaStream_t s);
int launch_gradient(const GemmLaunch& p, bool a_f32, cudaStream_t s);

}  // namespace lctx::cuda::narrow
#endif
