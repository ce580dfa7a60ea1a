/* Products cut along k: how many pieces, and their sum, in a fixed order. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "gemm_tiles.cuh"

namespace lctx::cuda {
namespace {

constexpr int THREADS = 256;

__global__ void join_kernel(const __grid_constant__ GemmLaunch p, const float* pieces) {
  const int64_t size = p.m * p.n;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; i < size; i += static_cast<int64_t>(gridDim.x) * THREADS) {
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < p.splits; s++) sum += pieces[s * size + i];
    store_c(p, i / p.n * p.ldc + i % p.n, p.alpha * sum);
  }
}

}  // namespace

/* Only where op(a) is a transpose, as in a gradient of weights: elsewhere an element's bits depend on its row, its column and k alone. */
int32_t gemm_splits(const GemmLaunch& p, bool a_f32, bool b_f32) {
  if (!p.trans_a || p.offsets != nullptr || p.k < 2048) return 1;
  if (const int32_t narrow = gemm_narrow_splits(p, a_f32, b_f32)) return narrow;
  const int64_t across = p.n <= 32 ? 1 : (p.n + 127) / 128, tiles = (p.m + 127) / 128 * across;
  const int64_t wanted = 264 / tiles, most = p.k / 512;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 2 ? 1 : splits > 64 ? 64 : static_cast<int32_t>(splits);
}

int launch_gemm_join(const GemmLaunch& p, const float* pieces, void* stream) {
  const int64_t blocks = (p.m * p.n + THREADS - 1) / THREADS;
  join_kernel<<<static_cast<unsigned>(blocks < 132 * 16 ? blocks : 132 * 16), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p, pieces);
  return cudaGetLastError();
}

}  // namespace lctx::cuda
