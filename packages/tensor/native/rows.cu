/* Ops that move or reduce rows: column sums, gathered rows. Sums run in an order that the shape alone fixes: the same bits every time. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "rows.cuh"

namespace lctx::cuda {
namespace {

constexpr int THREADS = 256;

/* 32 columns per block, 8 warps down the rows of this block's part; then their sums in order. */
__global__ void sum_rows_kernel(RowTensor a, int64_t rows, int64_t width, int64_t rows_per_part, RowTensor out, bool accumulate) {
  __shared__ float sums[8][33];
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32;
  const int64_t column = blockIdx.x * 32ll + tx;
  const int64_t first = blockIdx.y * rows_per_part, last = min(first + rows_per_part, rows);
  float sum = 0;
  if (column < width)
#pragma unroll 4
    for (int64_t r = first + ty; r < last; r += 8) sum += load_any(a, r * a.ld + column);
  sums[ty][tx] = sum;
  __syncthreads();
  if (ty != 0 || column >= width) return;
  sum = accumulate ? load_any(out, column) : 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += sums[i][tx];
  store_any(out, blockIdx.y * out.ld + column, sum);
}

__global__ void gather_kernel(EmbeddingLaunch p, bool wide) {
  for (int64_t i = blockIdx.x; i < p.n; i += gridDim.x) {
    const int32_t id = p.ids[i];
    const bool valid = id >= 0 && id < p.vocab;
    if (wide) {
      for (int64_t j = threadIdx.x * 8; j < p.width; j += THREADS * 8) {
        float v[8];
        if (valid) load8(p.table, id * p.table.ld + j, v);
        else
          for (float& e : v) e = __int_as_float(0x7fc00000);
        store8(p.rows, i * p.rows.ld + j, v);
      }
    } else {
      for (int64_t j = threadIdx.x; j < p.width; j += THREADS)
        store_any(p.rows, i * p.rows.ld + j, valid ? load_any(p.table, id * p.table.ld + j) : __int_as_float(0x7fc00000));
    }
  }
}

unsigned capped(int64_t n, int64_t most) { return static_cast<unsigned>(n < most ? n : most); }

}  // namespace

int64_t sum_rows_parts(int64_t rows) {
  const int64_t parts = rows / 128;
  return parts < 1 ? 1 : parts > 64 ? 64 : parts;
}

int launch_sum_rows(const RowsLaunch& p, void* stream) {
  if (p.width == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const auto columns = static_cast<unsigned>((p.width + 31) / 32);
  const int64_t parts = sum_rows_parts(p.rows), per_part = (p.rows + parts - 1) / parts;
  if (parts == 1) {
    sum_rows_kernel<<<columns, THREADS, 0, s>>>(p.a, p.rows, p.width, p.rows, p.out, p.accumulate);
  } else {
    const RowTensor partial{p.partial, LCTX_F32, p.width};
    sum_rows_kernel<<<dim3(columns, static_cast<unsigned>(parts)), THREADS, 0, s>>>(p.a, p.rows, p.width, per_part, partial, false);
    sum_rows_kernel<<<columns, THREADS, 0, s>>>(partial, parts, p.width, parts, p.out, p.accumulate);
  }
  return cudaGetLastError();
}

int launch_embedding_gather(const EmbeddingLaunch& p, void* stream) {
  if (p.n == 0) return 0;
  const bool wide = vectors(p.table, p.width) && vectors(p.rows, p.width);
  gather_kernel<<<capped(p.n, 132 * 16), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p, wide);
  return cudaGetLastError();
}

}  // namespace lctx::cuda
