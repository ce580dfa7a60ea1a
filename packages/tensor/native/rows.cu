/* Ops that reduce over rows or columns: RMSNorm, column sums, embedding. Sums run in a fixed order: the same bits every time. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace lctx::cuda {
namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ float load(const RowTensor& t, int64_t i) {
  return t.dtype == LCTX_F32 ? static_cast<const float*>(t.data)[i] : __bfloat162float(static_cast<const __nv_bfloat16*>(t.data)[i]);
}
__device__ __forceinline__ void store(const RowTensor& t, int64_t i, float v) {
  if (t.dtype == LCTX_F32) static_cast<float*>(t.data)[i] = v;
  else static_cast<__nv_bfloat16*>(t.data)[i] = __float2bfloat16(v);
}

/* Sum over the block, in a fixed order, for every thread. */
__device__ float block_sum(float v) {
  __shared__ float warps[THREADS / 32];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) sum += warps[w];
  return sum;
}

/* One block per (row, group), striding over them. */
__global__ void rms_norm_kernel(NormLaunch p) {
  for (int64_t item = blockIdx.x; item < p.rows * p.groups; item += gridDim.x) {
    const int64_t r = item / p.groups, g = item % p.groups, x = r * p.x.ld + g * p.width, out = r * p.out.ld + g * p.width;
    float squares = 0;
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) {
      const float v = load(p.x, x + i);
      squares += v * v;
    }
    const float inverse = rsqrtf(block_sum(squares) / static_cast<float>(p.width) + p.eps);
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) store(p.out, out + i, load(p.x, x + i) * inverse * load(p.weight, i));
  }
}

/* Blocks own contiguous ranges of rows, so that dweight's partial sums have a fixed order. */
__global__ void rms_norm_backward_kernel(NormLaunch p) {
  const int64_t items = p.rows * p.groups, per = (items + gridDim.x - 1) / gridDim.x;
  float* partial = p.dweight ? p.partial + blockIdx.x * p.width : nullptr;
  if (partial)
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) partial[i] = 0;
  for (int64_t item = blockIdx.x * per; item < items && item < (blockIdx.x + 1) * per; item++) {
    const int64_t r = item / p.groups, g = item % p.groups;
    const int64_t x = r * p.x.ld + g * p.width, dout = r * p.dout.ld + g * p.width, dx = r * p.dx.ld + g * p.width;
    float squares = 0, projection = 0;
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) {
      const float v = load(p.x, x + i);
      squares += v * v;
      projection += v * load(p.dout, dout + i) * load(p.weight, i);
    }
    const float n = static_cast<float>(p.width), inverse = rsqrtf(block_sum(squares) / n + p.eps);
    const float c = inverse * inverse * block_sum(projection) / n;
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) {
      const float v = load(p.x, x + i), d = load(p.dout, dout + i);
      if (partial) partial[i] += d * v * inverse;  // this thread's own columns
      const float gradient = inverse * (d * load(p.weight, i) - v * c);
      store(p.dx, dx + i, p.accumulate ? load(p.dx, dx + i) + gradient : gradient);
    }
  }
}
__global__ void add_partials_kernel(const float* partial, float* out, int64_t parts, int64_t width) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (i >= width) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; part++) sum += partial[part * width + i];
  out[i] += sum;
}

/* 32 columns per block, 8 threads down each; then their sums in order. */
__global__ void sum_rows_kernel(RowsLaunch p) {
  __shared__ float sums[8][33];
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32;
  const int64_t column = blockIdx.x * 32ll + tx;
  float sum = 0;
  if (column < p.width)
    for (int64_t r = ty; r < p.rows; r += 8) sum += load(p.a, r * p.a.ld + column);
  sums[ty][tx] = sum;
  __syncthreads();
  if (ty != 0 || column >= p.width) return;
  sum = p.accumulate ? load(p.out, column) : 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += sums[i][tx];
  store(p.out, column, sum);
}

__global__ void gather_kernel(EmbeddingLaunch p) {
  for (int64_t i = blockIdx.x; i < p.n; i += gridDim.x) {
    const int32_t id = p.ids[i];
    const bool valid = id >= 0 && id < p.vocab;
    for (int64_t j = threadIdx.x; j < p.width; j += THREADS) store(p.rows, i * p.rows.ld + j, valid ? load(p.table, id * p.table.ld + j) : __int_as_float(0x7fc00000));
  }
}

/* A thread owns a column and takes tokens in order: no two threads meet, and the order is fixed. */
__global__ void scatter_kernel(EmbeddingLaunch p) {
  const int64_t j = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (j >= p.width) return;
  float* table = static_cast<float*>(p.table.data);
  for (int64_t i = 0; i < p.n; i++) {
    const int32_t id = p.ids[i];
    if (id >= 0 && id < p.vocab) table[id * p.table.ld + j] += load(p.rows, i * p.rows.ld + j);
  }
}

unsigned capped(int64_t n, int64_t most) { return static_cast<unsigned>(n < most ? n : most); }

}  // namespace

int launch_rms_norm(const NormLaunch& p, void* stream) {
  if (p.rows * p.groups == 0) return 0;
  rms_norm_kernel<<<capped(p.rows * p.groups, 132 * 16), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
int launch_rms_norm_backward(const NormLaunch& p, void* stream) {
  if (p.rows * p.groups == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const unsigned blocks = capped(p.rows * p.groups, p.dweight ? p.partials : 132 * 16);
  rms_norm_backward_kernel<<<blocks, THREADS, 0, s>>>(p);
  if (p.dweight) add_partials_kernel<<<static_cast<unsigned>((p.width + THREADS - 1) / THREADS), THREADS, 0, s>>>(p.partial, p.dweight, blocks, p.width);
  return cudaGetLastError();
}
int launch_sum_rows(const RowsLaunch& p, void* stream) {
  if (p.width == 0) return 0;
  sum_rows_kernel<<<static_cast<unsigned>((p.width + 31) / 32), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
int launch_embedding_gather(const EmbeddingLaunch& p, void* stream) {
  if (p.n == 0) return 0;
  gather_kernel<<<capped(p.n, 132 * 16), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
int launch_embedding_scatter_add(const EmbeddingLaunch& p, void* stream) {
  if (p.n == 0 || p.width == 0) return 0;
  scatter_kernel<<<static_cast<unsigned>((p.width + THREADS - 1) / THREADS), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace lctx::cuda
