/* Ops that move or reduce rows: column sums, embedding. Sums run in an order that the shape alone fixes: the same bits every time. */
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

constexpr int COLUMNS = 3;

/* A block per token of [first, first + count) and 768 columns. The first token with an id adds up all of that id, in their order; the others do nothing. */
__global__ void scatter_kernel(EmbeddingLaunch p, int64_t first, int64_t count) {
  const int32_t* ids = p.ids + first;
  const int64_t mine = blockIdx.x;
  const int32_t id = ids[mine];
  if (id < 0 || id >= p.vocab) return;
  bool earlier = false;
  // From the token backwards: what is common is found soon.
  for (int64_t end = mine; end > 0; end -= 8 * THREADS) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int64_t at = end - 1 - i * THREADS - threadIdx.x;
      earlier |= at >= 0 && ids[at] == id;
    }
    if (__syncthreads_or(earlier)) return;
  }
  __shared__ int64_t found[THREADS];
  __shared__ int warps[THREADS / 32];
  float* row = static_cast<float*>(p.table.data) + id * p.table.ld;
  const int64_t column = blockIdx.y * (COLUMNS * THREADS) + threadIdx.x;
  for (int64_t base = mine; base < count; base += THREADS) {
    // The next 256 tokens: those of this id, in order.
    const int64_t i = base + threadIdx.x;
    const bool hit = i < count && ids[i] == id;
    const unsigned hits = __ballot_sync(~0u, hit);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = __popc(hits);
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
      if (w < static_cast<int>(threadIdx.x / 32)) before += warps[w];
      total += warps[w];
    }
    if (hit) found[before + __popc(hits & ((1u << threadIdx.x % 32) - 1))] = first + i;
    __syncthreads();
    // Three columns a thread: enough reads in flight where one id has thousands of tokens.
    if (total > 0) {
      float sum[COLUMNS];
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) sum[c] = column + c * THREADS < p.width ? row[column + c * THREADS] : 0.0f;
#pragma unroll 4
      for (int t = 0; t < total; t++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
          if (column + c * THREADS < p.width) sum[c] += load_any(p.rows, found[t] * p.rows.ld + column + c * THREADS);
#pragma unroll
      for (int c = 0; c < COLUMNS; c++)
        if (column + c * THREADS < p.width) row[column + c * THREADS] = sum[c];
    }
    __syncthreads();
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
int launch_embedding_scatter_add(const EmbeddingLaunch& p, void* stream) {
  if (p.width == 0) return 0;
  // Looking for an id's first token costs tokens squared: pieces keep that far below the cost of the rows themselves.
  constexpr int64_t kPiece = 16384;
  for (int64_t first = 0; first < p.n; first += kPiece) {
    const int64_t count = p.n - first < kPiece ? p.n - first : kPiece;
    const auto across = static_cast<unsigned>((p.width + COLUMNS * THREADS - 1) / (COLUMNS * THREADS));
    scatter_kernel<<<dim3(static_cast<unsigned>(count), across), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p, first, count);
  }
  return cudaGetLastError();
}

}  // namespace lctx::cuda
