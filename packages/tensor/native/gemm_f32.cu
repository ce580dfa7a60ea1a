/* f32 GEMM by FFMA: no tensor core has full f32. 128 x 128 of c per block, 8 x 8 per thread. For LoRA's f32 parameters and for checks. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace lctx::cuda {
namespace {

constexpr int BM = 128, BN = 128, BK = 16, THREADS = 256;

__global__ void __launch_bounds__(THREADS) gemm_f32_kernel(GemmLaunch p) {
  __shared__ float sa[BK][BM + 4], sb[BK][BN + 4];
  const float* a = static_cast<const float*>(p.a);
  const float* b = static_cast<const float*>(p.b);
  float* c = static_cast<float*>(p.c);
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
  float acc[8][8] = {};
  for (int64_t k0 = 0; k0 < k; k0 += BK) {
    for (int i = threadIdx.x; i < BK * BM; i += THREADS) {
      // Neighbouring threads read neighbouring addresses, whichever way the operand lies.
      const int ka = p.trans_a ? i / BM : i % BK, ma = p.trans_a ? i % BM : i / BK;
      const int64_t gk = k0 + ka, gm = m0 + ma;
      sa[ka][ma] = gk < k && gm < m ? a[p.trans_a ? gk * p.lda + gm : gm * p.lda + gk] : 0.0f;
      const int kb = p.trans_b ? i % BK : i / BN, nb = p.trans_b ? i / BK : i % BN;
      const int64_t hk = k0 + kb, hn = n0 + nb;
      sb[kb][nb] = hk < k && hn < p.n ? b[p.trans_b ? hn * p.ldb + hk : hk * p.ldb + hn] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < BK; kk++) {
      float ra[8], rb[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        ra[i] = sa[kk][ty * 8 + i];
        rb[i] = sb[kk][tx + i * 16];
      }
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) acc[i][j] += ra[i] * rb[j];
    }
    __syncthreads();
  }
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) {
      const int64_t row = m0 + ty * 8 + i, column = n0 + tx + j * 16;
      if (row >= m || column >= p.n) continue;
      float v = p.alpha * acc[i][j];
      if (p.beta != 0.0f) v += p.beta * c[row * p.ldc + column];
      c[row * p.ldc + column] = v;
    }
}

}  // namespace

int launch_gemm_f32(const GemmLaunch& p, void* stream) {
  if (p.m == 0 || p.n == 0) return 0;
  const auto tiles = [](int64_t n, int64_t t) { return static_cast<unsigned>((n + t - 1) / t); };
  dim3 grid(tiles(p.n, BN), tiles(p.m, BM));
  if (p.offsets != nullptr && p.mode == 0) grid.y += p.experts;
  if (p.offsets != nullptr && p.mode == 1) grid.z = p.experts;
  gemm_f32_kernel<<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace lctx::cuda
