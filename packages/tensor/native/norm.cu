/* RMSNorm, forward and backward. Sums run in an order that the shape alone fixes: the same bits every time.
 *
 * A group of threads (8 for heads of 64, a warp, or a block) holds a whole row in registers, eight elements per thread and piece: a row is read once. Rows that
 * cannot be taken eight elements at a time, or are wider than 8,192, take the plain kernels. */
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_kernels.h"
#include "rows.cuh"

namespace lctx::cuda {
namespace {

constexpr int THREADS = 128;

/* Sum over GROUP threads, for every one of them. */
template <int GROUP>
__device__ __forceinline__ float group_sum(float v) {
  // Groups of one warp may be at different rows, or done.
  const unsigned mask = GROUP >= 32 ? ~0u : ((1u << GROUP % 32) - 1) << (threadIdx.x % 32 / GROUP * GROUP);
#pragma unroll
  for (int o = GROUP < 32 ? GROUP / 2 : 16; o; o >>= 1) v += __shfl_xor_sync(mask, v, o);
  if constexpr (GROUP > 32) {
    __shared__ float warps[GROUP / 32];
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
#pragma unroll
    for (int w = 0; w < GROUP / 32; w++) v += warps[w];
  }
  return v;
}

struct Item {
  int64_t x, out, dout, dx;
};
__device__ __forceinline__ Item item_at(const NormLaunch& p, int64_t item) {
  const int64_t r = item / p.groups, g = (item % p.groups) * p.width;
  return {r * p.x.ld + g, r * p.out.ld + g, r * p.dout.ld + g, r * p.dx.ld + g};
}

template <int GROUP, int PIECES>
__global__ void __launch_bounds__(THREADS) rms_norm_kernel(NormLaunch p) {
  const int lane = threadIdx.x % GROUP;
  const int64_t items = p.rows * p.groups;
  for (int64_t item = blockIdx.x * (THREADS / GROUP) + threadIdx.x / GROUP; item < items; item += gridDim.x * (THREADS / GROUP)) {
    const Item at = item_at(p, item);
    float x[PIECES][8], squares = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int column = (i * GROUP + lane) * 8;
      if (column >= p.width) continue;
      load8(p.x, at.x + column, x[i]);
#pragma unroll
      for (int j = 0; j < 8; j++) squares += x[i][j] * x[i][j];
    }
    const float inverse = rsqrtf(group_sum<GROUP>(squares) / static_cast<float>(p.width) + p.eps);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int column = (i * GROUP + lane) * 8;
      if (column >= p.width) continue;
      float w[8];
      load8(p.weight, column, w);
#pragma unroll
      for (int j = 0; j < 8; j++) x[i][j] = x[i][j] * inverse * w[j];
      store8(p.out, at.out + column, x[i]);
    }
  }
}

/* Groups own contiguous ranges of rows, so that dweight's partial sums have a fixed order. */
template <int GROUP, int PIECES, bool WEIGHT>
__global__ void __launch_bounds__(THREADS) rms_norm_backward_kernel(NormLaunch p) {
  const int lane = threadIdx.x % GROUP;
  const int64_t items = p.rows * p.groups, groups = gridDim.x * static_cast<int64_t>(THREADS / GROUP), per = (items + groups - 1) / groups;
  const int64_t mine = blockIdx.x * (THREADS / GROUP) + threadIdx.x / GROUP, last = min(items, (mine + 1) * per);
  float dw[PIECES][8] = {};
  for (int64_t item = mine * per; item < last; item++) {
    const Item at = item_at(p, item);
    float x[PIECES][8], d[PIECES][8], squares = 0, projection = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int column = (i * GROUP + lane) * 8;
      if (column >= p.width) continue;
      load8(p.x, at.x + column, x[i]);
      load8(p.dout, at.dout + column, d[i]);
      float w[8];
      load8(p.weight, column, w);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        squares += x[i][j] * x[i][j];
        projection += x[i][j] * d[i][j] * w[j];
      }
    }
    const float n = static_cast<float>(p.width), inverse = rsqrtf(group_sum<GROUP>(squares) / n + p.eps);
    const float c = inverse * inverse * group_sum<GROUP>(projection) / n;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int column = (i * GROUP + lane) * 8;
      if (column >= p.width) continue;
      float w[8], before[8] = {};
      load8(p.weight, column, w);
      if (p.accumulate) load8(p.dx, at.dx + column, before);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (WEIGHT) dw[i][j] += d[i][j] * x[i][j] * inverse;
        const float gradient = inverse * (d[i][j] * w[j] - x[i][j] * c);
        d[i][j] = p.accumulate ? before[j] + gradient : gradient;
      }
      store8(p.dx, at.dx + column, d[i]);
    }
  }
  if (WEIGHT && mine < p.partials) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int column = (i * GROUP + lane) * 8;
      if (column < p.width) store8({p.partial, LCTX_F32, p.width}, mine * p.width + column, dw[i]);
    }
  }
}

/* ---- any row ---- */
__global__ void rms_norm_any_kernel(NormLaunch p) {
  for (int64_t item = blockIdx.x; item < p.rows * p.groups; item += gridDim.x) {
    const Item at = item_at(p, item);
    float squares = 0;
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) {
      const float v = load_any(p.x, at.x + i);
      squares += v * v;
    }
    const float inverse = rsqrtf(group_sum<THREADS>(squares) / static_cast<float>(p.width) + p.eps);
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) store_any(p.out, at.out + i, load_any(p.x, at.x + i) * inverse * load_any(p.weight, i));
  }
}
__global__ void rms_norm_backward_any_kernel(NormLaunch p) {
  const int64_t items = p.rows * p.groups, per = (items + gridDim.x - 1) / gridDim.x, last = min(items, (blockIdx.x + 1) * per);
  float* partial = p.dweight ? p.partial + blockIdx.x * p.width : nullptr;
  if (partial)
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) partial[i] = 0;
  for (int64_t item = blockIdx.x * per; item < last; item++) {
    const Item at = item_at(p, item);
    float squares = 0, projection = 0;
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) {
      const float v = load_any(p.x, at.x + i);
      squares += v * v;
      projection += v * load_any(p.dout, at.dout + i) * load_any(p.weight, i);
    }
    const float n = static_cast<float>(p.width), inverse = rsqrtf(group_sum<THREADS>(squares) / n + p.eps);
    const float c = inverse * inverse * group_sum<THREADS>(projection) / n;
    for (int64_t i = threadIdx.x; i < p.width; i += THREADS) {
      const float v = load_any(p.x, at.x + i), d = load_any(p.dout, at.dout + i);
      if (partial) partial[i] += d * v * inverse;  // this thread's own columns
      const float gradient = inverse * (d * load_any(p.weight, i) - v * c);
      store_any(p.dx, at.dx + i, p.accumulate ? load_any(p.dx, at.dx + i) + gradient : gradient);
    }
  }
}

bool wide(const NormLaunch& p, bool backward) {
  const int64_t row = p.width * p.groups;
  return p.width % 8 == 0 && p.width <= 8192 && reinterpret_cast<uintptr_t>(p.weight.data) % 16 == 0 && vectors(p.x, row) &&
         (backward ? vectors(p.dout, row) && vectors(p.dx, row) : vectors(p.out, row));
}
/* fn.template operator()<GROUP, PIECES>() of the smallest that holds a row. */
template <class Fn>
void by_width(int64_t width, Fn fn) {
  if (width <= 64) fn.template operator()<8, 1>();
  else if (width <= 128) fn.template operator()<16, 1>();
  else if (width <= 256) fn.template operator()<32, 1>();
  else if (width <= 1024) fn.template operator()<32, 4>();
  else if (width <= 3072) fn.template operator()<128, 3>();
  else if (width <= 5120) fn.template operator()<128, 5>();
  else fn.template operator()<128, 8>();
}
struct Forward {
  const NormLaunch& p;
  cudaStream_t s;
  template <int GROUP, int PIECES>
  void operator()() const {
    const int64_t per = THREADS / GROUP, blocks = (p.rows * p.groups + per - 1) / per;
    rms_norm_kernel<GROUP, PIECES><<<static_cast<unsigned>(blocks < 132 * 64 ? blocks : 132 * 64), THREADS, 0, s>>>(p);
  }
};
struct Backward {
  const NormLaunch& p;
  cudaStream_t s;
  template <int GROUP, int PIECES>
  void operator()() const {
    // With dweight each group holds a partial sum, so there are few, with many rows each; else short blocks, which fill the card to the end.
    constexpr int64_t PER = THREADS / GROUP;
    const int64_t groups = p.dweight ? p.partials : p.rows * p.groups;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((groups + PER - 1) / PER, 132 * 64));
    if (p.dweight) rms_norm_backward_kernel<GROUP, PIECES, true><<<blocks, THREADS, 0, s>>>(p);
    else rms_norm_backward_kernel<GROUP, PIECES, false><<<blocks, THREADS, 0, s>>>(p);
  }
};

}  // namespace

int64_t rms_norm_partials(const NormLaunch& p) {
  const int64_t items = p.rows * p.groups;
  if (!wide(p, true) || p.width > 1024) return items < 132 * 4 ? items : 132 * 4;  // a block each
  const int64_t per_block = THREADS / (p.width <= 64 ? 8 : p.width <= 128 ? 16 : 32);
  const int64_t blocks = (items + per_block - 1) / per_block;
  return (blocks < 132 * 8 ? blocks : 132 * 8) * per_block;
}

int launch_rms_norm(const NormLaunch& p, void* stream) {
  const int64_t items = p.rows * p.groups;
  if (items == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (wide(p, false)) by_width(p.width, Forward{p, s});
  else rms_norm_any_kernel<<<static_cast<unsigned>(items < 132 * 64 ? items : 132 * 64), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}

int launch_rms_norm_backward(const NormLaunch& p, void* stream) {
  if (p.rows * p.groups == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (wide(p, true)) by_width(p.width, Backward{p, s});
  else rms_norm_backward_any_kernel<<<static_cast<unsigned>(p.partials), THREADS, 0, s>>>(p);
  const int error = cudaGetLastError();
  if (error || !p.dweight) return error;
  RowsLaunch sum{};
  sum.a = {p.partial, LCTX_F32, p.width};
  sum.out = {p.dweight, LCTX_F32, p.width};
  sum.rows = p.partials;
  sum.width = p.width;
  sum.accumulate = true;
  sum.partial = p.partial + p.partials * p.width;
  return launch_sum_rows(sum, stream);
}

}  // namespace lctx::cuda
