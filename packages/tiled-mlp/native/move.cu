/* Rows moved between tokens and experts. Arithmetic in f32; sums over a token's experts run in order. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "vectors.cuh"

namespace lctx::mlp::cuda {
namespace {

/* The kernels with `8` take bf16 eight elements a thread; the others any rows. The values are the same. */
/* TOP_K: of p, or 0 for any. By token, so that x, of which a tile may have more than fits into L2, is read once. */
template <int TOP_K>
__global__ void __launch_bounds__(THREADS) gather8_kernel(const __grid_constant__ Gather p, const __grid_constant__ Divide per_row, uint32_t count) {
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const uint32_t token = per_row(i), eighth = i - token * per_row.by;
  const int64_t t = token, c = eighth * 8, top_k = TOP_K ? TOP_K : p.top_k;
  const uint4 x = __ldg(eight(p.x, t * p.x.ld + c));
#pragma unroll
  for (int64_t j = 0; j < top_k; j++) {
    const int64_t pair = t * top_k + j;
    uint4 y = x;
    if (p.weights) {
      const float weight = p.weights[pair];
      float v[8];
      unpack(x, v);
#pragma unroll
      for (float& e : v) e *= weight;
      y = pack(v);
    }
    *eight(p.out, p.row_of[pair] * p.out.ld + c) = y;
  }
}

/* TOP_K as above. */
template <int TOP_K>
__global__ void __launch_bounds__(THREADS) combine8_kernel(const __grid_constant__ Combine p, const __grid_constant__ Divide per_row, uint32_t count) {
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const uint32_t token = per_row(i), eighth = i - token * per_row.by;
  const int64_t t = token, c = eighth * 8, top_k = TOP_K ? TOP_K : p.top_k;
  float sum[8] = {};
  if (p.base.data) unpack(*eight(p.base, t * p.base.ld + c), sum);
#pragma unroll
  for (int64_t j = 0; j < top_k; j++) {
    const int64_t pair = t * top_k + j;
    float v[8];
    unpack(__ldg(eight(p.y, p.row_of[pair] * p.y.ld + c)), v);
    if (p.bias.data) {
      float bias[8];
      load8(p.bias, p.ids[pair] * p.bias.ld + c, bias);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] += bias[e];
    }
    const float weight = p.weights ? p.weights[pair] : 1.0f;
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] += weight * v[e];
  }
  *eight(p.out, t * p.out.ld + c) = pack(sum);
}

__global__ void gather_kernel(Gather p) {
  LCTX_GRID_STRIDE(i, p.tokens * p.width) {
    const int64_t t = i / p.width, c = i % p.width;
    const float v = load_any(p.x, t * p.x.ld + c);
    for (int64_t pair = t * p.top_k; pair < (t + 1) * p.top_k; pair++) store_any(p.out, p.row_of[pair] * p.out.ld + c, p.weights ? v * p.weights[pair] : v);
  }
}

__global__ void combine_kernel(Combine p) {
  LCTX_GRID_STRIDE(i, p.tokens * p.width) {
    const int64_t t = i / p.width, c = i % p.width;
    float sum = p.base.data ? load_any(p.base, t * p.base.ld + c) : 0.0f;
    for (int64_t j = 0; j < p.top_k; j++) {
      const int64_t pair = t * p.top_k + j;
      float v = load_any(p.y, p.row_of[pair] * p.y.ld + c);
      if (p.bias.data) v += load_any(p.bias, p.ids[pair] * p.bias.ld + c);
      sum += p.weights ? p.weights[pair] * v : v;
    }
    store_any(p.out, t * p.out.ld + c, sum);
  }
}

}  // namespace

int gather(const Gather& p, cudaStream_t s) {
  if (p.tokens * p.width == 0) return 0;
  if (countable(p.tokens, p.width) && vectors_bf16(p.x) && vectors_bf16(p.out)) {
    const uint32_t n = eights(p.tokens, p.width);
    const Divide per_row(static_cast<uint32_t>(p.width / 8));
    if (p.top_k == 4) gather8_kernel<4><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
    else if (p.top_k == 8) gather8_kernel<8><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
    else gather8_kernel<0><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
  } else {
    gather_kernel<<<blocks(p.tokens * p.width), THREADS, 0, s>>>(p);
  }
  return cudaGetLastError();
}
int combine(const Combine& p, cudaStream_t s) {
  if (p.tokens * p.width == 0) return 0;
  if (countable(p.tokens, p.width) && vectors_bf16(p.y) && vectors_bf16(p.out) && vectors_bf16(p.base) && vectors(p.bias)) {
    const uint32_t n = eights(p.tokens, p.width);
    const Divide per_row(static_cast<uint32_t>(p.width / 8));
    if (p.top_k == 4) combine8_kernel<4><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
    else if (p.top_k == 8) combine8_kernel<8><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
    else combine8_kernel<0><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
  } else {
    combine_kernel<<<blocks(p.tokens * p.width), THREADS, 0, s>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace lctx::mlp::cuda
