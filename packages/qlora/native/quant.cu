/* 4 bits to bf16 or f32. A thread takes 32 codes (16 bytes in, 64 or 128 bytes out), so loads and stores are whole sectors. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lctx/abi.h"

namespace lc_qlora::cuda {
namespace {

constexpr int THREADS = 256;
__constant__ float kNf4Levels[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                                     -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
__constant__ float kE2m1Levels[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

/* 32 codes of 16 bytes, times scale. */
template <bool HIGH_FIRST, typename Out>
__device__ __forceinline__ void decode(uint4 codes, const float* table, float scale, Out* out) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    Out v[8];
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const uint32_t byte = (words[w] >> (8 * b)) & 255;
      v[2 * b] = static_cast<Out>(table[HIGH_FIRST ? byte >> 4 : byte & 15] * scale);
      v[2 * b + 1] = static_cast<Out>(table[HIGH_FIRST ? byte & 15 : byte >> 4] * scale);
    }
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof v / 16); i++) reinterpret_cast<uint4*>(out + w * 8)[i] = reinterpret_cast<const uint4*>(v)[i];
  }
}

template <typename Out>
__global__ void nf4_kernel(Nf4Dequantize p, const float* map) {
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = kNf4Levels[threadIdx.x];
  __syncthreads();
  Out* out = static_cast<Out*>(p.out);
  const int64_t groups = (p.n + 31) / 32;
  for (int64_t g = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; g < groups; g += static_cast<int64_t>(gridDim.x) * THREADS) {
    const int64_t b = g * 32 / p.block;
    // No fma: the CPU's loop rounds the product, then the sum, and the bits are to be the same.
    const float scale = p.absmax ? p.absmax[b] : __fadd_rn(__fmul_rn(map[p.codes2[b]], p.scales[b / kScaleBlock]), *p.offset);
    if (g * 32 + 32 <= p.n) {
      decode<true>(reinterpret_cast<const uint4*>(p.codes)[g], table, scale, out + g * 32);
    } else {
      for (int64_t i = g * 32; i < p.n; i++) {
        const uint8_t byte = p.codes[i / 2];
        out[i] = static_cast<Out>(table[i % 2 ? byte & 15 : byte >> 4] * scale);
      }
    }
  }
}

template <typename Out>
__global__ void mxfp4_kernel(Mxfp4 p) {
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = kE2m1Levels[threadIdx.x];
  __syncthreads();
  Out* out = static_cast<Out*>(p.values);
  for (int64_t g = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; g < p.n / 32; g += static_cast<int64_t>(gridDim.x) * THREADS) {
    const uint32_t e = p.scales[g];
    const float scale = e == 255 ? __int_as_float(0x7fc00000) : e == 0 ? __int_as_float(0x00400000) : __int_as_float(static_cast<int>(e << 23));
    decode<false>(reinterpret_cast<const uint4*>(p.blocks)[g], table, scale, out + g * 32);
  }
}

unsigned blocks(int64_t groups) {
  const int64_t n = (groups + THREADS - 1) / THREADS;
  return static_cast<unsigned>(n < 132 * 16 ? n : 132 * 16);
}

}  // namespace

int nf4_dequantize(const Nf4Dequantize& p, const float* map, cudaStream_t s) {
  if (p.n == 0) return 0;
  if (p.out_dtype == LCTX_F32) nf4_kernel<float><<<blocks((p.n + 31) / 32), THREADS, 0, s>>>(p, map);
  else nf4_kernel<__nv_bfloat16><<<blocks((p.n + 31) / 32), THREADS, 0, s>>>(p, map);
  return cudaGetLastError();
}
int mxfp4_dequantize(const Mxfp4& p, cudaStream_t s) {
  if (p.n == 0) return 0;
  if (p.dtype == LCTX_F32) mxfp4_kernel<float><<<blocks(p.n / 32), THREADS, 0, s>>>(p);
  else mxfp4_kernel<__nv_bfloat16><<<blocks(p.n / 32), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}

}  // namespace lc_qlora::cuda
