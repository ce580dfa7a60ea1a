/* Losses added up, and rows moved by index. */
#include <cuda_runtime.h>

#include "rows.cuh"

namespace lctx::chunked_ce::cuda {
namespace {

__global__ void add_losses_kernel(const float* loss, int64_t rows, float* sum) {
  __shared__ double partial[256];
  double s = 0;
  const int64_t per = (rows + 255) / 256;
  for (int64_t i = threadIdx.x * per; i < rows && i < (threadIdx.x + 1) * per; i++) s += loss[i];
  partial[threadIdx.x] = s;
  __syncthreads();
  if (threadIdx.x != 0) return;
  s = static_cast<double>(sum[0]) + sum[1];
  for (int t = 0; t < 256; t++) s += partial[t];
  sum[0] = static_cast<float>(s);
  sum[1] = static_cast<float>(s - static_cast<double>(sum[0]));
}

__global__ void move_kernel(Move p, bool wide) {
  const int64_t i = blockIdx.x, at = p.index[i];
  const char* src = static_cast<const char*>(p.src) + (p.gather ? at : i) * p.ldsrc;
  char* dst = static_cast<char*>(p.dst) + (p.gather ? i : at) * p.lddst;
  if (wide) {
    for (int64_t b = threadIdx.x * 16; b < p.bytes; b += blockDim.x * 16) *reinterpret_cast<uint4*>(dst + b) = *reinterpret_cast<const uint4*>(src + b);
  } else {
    for (int64_t b = threadIdx.x * 2; b < p.bytes; b += blockDim.x * 2) *reinterpret_cast<uint16_t*>(dst + b) = *reinterpret_cast<const uint16_t*>(src + b);
  }
}

}  // namespace

int cross_entropy_rows(const Rows& p, cudaStream_t stream) {
  int status = 0;
  if (p.rows == 0 || one_read(p, stream, &status)) return status;
  return two_reads(p, stream);
}
int add_losses(const float* loss, int64_t rows, float* sum, cudaStream_t stream) {
  add_losses_kernel<<<1, 256, 0, stream>>>(loss, rows, sum);
  return cudaGetLastError();
}
int move_rows(const Move& p, cudaStream_t stream) {
  if (p.rows == 0) return 0;
  const bool wide = (reinterpret_cast<uintptr_t>(p.src) | reinterpret_cast<uintptr_t>(p.dst) | p.bytes | p.ldsrc | p.lddst) % 16 == 0;
  move_kernel<<<static_cast<unsigned>(p.rows), 256, 0, stream>>>(p, wide);
  return cudaGetLastError();
}

}  // namespace lctx::chunked_ce::cuda
