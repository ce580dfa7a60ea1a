/* GEMM by FFMA, operands f32 or bf16 in any mixture, arithmetic f32: what tensor cores do not do. LoRA's f32 parameters against bf16 activations, router
 * gradients, checks. 128 x 128 of c per block, 8 x 8 per thread; narrow tiles of 128 x 16 for the small ranks of LoRA. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace lctx::cuda {
namespace {

constexpr int BM = 128, BK = 16, THREADS = 256;

__device__ __forceinline__ float as_float(float v) { return v; }
__device__ __forceinline__ float as_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void put(float* p, float v) { *p = v; }
__device__ __forceinline__ void put(__nv_bfloat16* p, float v) { *p = __float2bfloat16(v); }

template <typename A, typename B, typename C, int BN>
__global__ void __launch_bounds__(THREADS) gemm_ffma_kernel(GemmLaunch p) {
  constexpr int COLUMNS = BN / 16;  // per thread
  __shared__ float sa[BK][BM + 4], sb[BK][BN + 4];
  const A* a = static_cast<const A*>(p.a);
  const B* b = static_cast<const B*>(p.b);
  C* c = static_cast<C*>(p.c);
  int64_t m = p.m, k = p.k, tile_m = blockIdx.y;
  if (p.offsets != nullptr && p.mode == 0) {
    int64_t left = blockIdx.y;
    int expert = 0;
    int32_t start = 0, end = 0;
    for (; expert < p.experts; expert++) {
      start = p.offsets[expert];
      end = p.offsets[expert + 1];
      const int64_t tiles = (end - start + BM - 1) / BM;
      if (left < tiles) break;
      left -= tiles;
    }
    if (expert == p.experts) return;
    tile_m = left;
    m = end - start;
    a += static_cast<int64_t>(start) * p.lda;
    c += static_cast<int64_t>(start) * p.ldc;
    b += expert * p.stride_b;
  } else if (p.offsets != nullptr) {
    const int expert = blockIdx.z;
    const int32_t start = p.offsets[expert];
    k = p.offsets[expert + 1] - start;
    a += static_cast<int64_t>(start) * p.lda;
    b += static_cast<int64_t>(start) * p.ldb;
    c += expert * p.stride_c;
  }
  const int64_t m0 = tile_m * BM, n0 = static_cast<int64_t>(blockIdx.x) * BN;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[8][COLUMNS] = {};
  for (int64_t k0 = 0; k0 < k; k0 += BK) {
    for (int i = threadIdx.x; i < BK * BM; i += THREADS) {
      // Neighbouring threads read neighbouring addresses, whichever way the operand lies.
      const int ka = p.trans_a ? i / BM : i % BK, ma = p.trans_a ? i % BM : i / BK;
      const int64_t gk = k0 + ka, gm = m0 + ma;
      sa[ka][ma] = gk < k && gm < m ? as_float(a[p.trans_a ? gk * p.lda + gm : gm * p.lda + gk]) : 0.0f;
    }
    for (int i = threadIdx.x; i < BK * BN; i += THREADS) {
      const int kb = p.trans_b ? i % BK : i / BN, nb = p.trans_b ? i / BK : i % BN;
      const int64_t gk = k0 + kb, gn = n0 + nb;
      sb[kb][nb] = gk < k && gn < p.n ? as_float(b[p.trans_b ? gn * p.ldb + gk : gk * p.ldb + gn]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < BK; kk++) {
      float ra[8], rb[COLUMNS];
#pragma unroll
      for (int i = 0; i < 8; i++) ra[i] = sa[kk][ty * 8 + i];
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) rb[j] = sb[kk][tx + j * 16];
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) acc[i][j] += ra[i] * rb[j];
    }
    __syncthreads();
  }
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < COLUMNS; j++) {
      const int64_t row = m0 + ty * 8 + i, column = n0 + tx + j * 16;
      if (row >= m || column >= p.n) continue;
      float v = p.alpha * acc[i][j];
      C* at = c + row * p.ldc + column;
      if (p.beta != 0.0f) v += p.beta * as_float(*at);
      put(at, v);
    }
}

template <typename A, typename B, typename C, int BN>
int launch(const GemmLaunch& p, cudaStream_t stream) {
  const auto tiles = [](int64_t n, int64_t t) { return static_cast<unsigned>((n + t - 1) / t); };
  dim3 grid(tiles(p.n, BN), tiles(p.m, BM));
  if (p.offsets != nullptr && p.mode == 0) grid.y += p.experts;
  if (p.offsets != nullptr && p.mode == 1) grid.z = p.experts;
  gemm_ffma_kernel<A, B, C, BN><<<grid, THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}
template <typename A, typename B, typename C>
int launch_width(const GemmLaunch& p, cudaStream_t s) {
  return p.n <= 32 ? launch<A, B, C, 16>(p, s) : launch<A, B, C, 128>(p, s);
}
template <typename A, typename B>
int launch_c(const GemmLaunch& p, cudaStream_t s) {
  return p.c_f32 ? launch_width<A, B, float>(p, s) : launch_width<A, B, __nv_bfloat16>(p, s);
}

}  // namespace

int launch_gemm_ffma(const GemmLaunch& p, bool a_f32, bool b_f32, void* stream) {
  if (p.m == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a_f32) return b_f32 ? launch_c<float, float>(p, s) : launch_c<float, __nv_bfloat16>(p, s);
  return b_f32 ? launch_c<__nv_bfloat16, float>(p, s) : launch_c<__nv_bfloat16, __nv_bfloat16>(p, s);
}

}  // namespace lctx::cuda
