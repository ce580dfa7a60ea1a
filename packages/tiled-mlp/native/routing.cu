/* Top-k routing and its gradient. The sort by expert is a counting sort by one block per expert that walks the pairs in order: stable, and the same every time. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lctx/device_rows.cuh"

namespace lctx::mlp::cuda {
namespace {

constexpr int THREADS = 256;

/* One thread per token: k rounds of "largest not taken yet, ties to the lower expert". */
__global__ void top_k_kernel(RouteParams p) {
  const int64_t t = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (t >= p.tokens) return;
  float* z = p.logits + t * p.ldlogits;
  float max = -INFINITY;
  for (int64_t e = 0; e < p.experts; e++) max = fmaxf(max, z[e]);
  int32_t* ids = p.ids + t * p.top_k;
  float* weights = p.weights + t * p.top_k;
  float sum = 0;
  for (int64_t j = 0; j < p.top_k; j++) {
    int best = -1;
    for (int e = 0; e < p.experts; e++) {
      bool taken = false;
      for (int64_t i = 0; i < j; i++) taken |= ids[i] == e;
      if (!taken && (best < 0 || z[e] > z[best])) best = e;
    }
    ids[j] = best;
    weights[j] = expf(z[best] - max);
    sum += weights[j];
  }
  if (p.softmax_first) {
    float all = 0;
    for (int64_t e = 0; e < p.experts; e++) {
      z[e] = expf(z[e] - max);
      all += z[e];
    }
    for (int64_t e = 0; e < p.experts; e++) z[e] /= all;
    if (!p.normalize) sum = all;
  }
  for (int64_t j = 0; j < p.top_k; j++) weights[j] /= sum;
}

__device__ int block_count(bool flag, int* rank) {
  __shared__ int warps[THREADS / 32];
  const unsigned mask = __ballot_sync(~0u, flag);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
  if (lane == 0) warps[warp] = __popc(mask);
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < THREADS / 32; w++) {
    before += w < warp ? warps[w] : 0;
    total += warps[w];
  }
  *rank = before + __popc(mask & ((1u << lane) - 1));
  return total;
}

__global__ void count_kernel(const int32_t* ids, int64_t pairs, int32_t* offsets) {
  const int e = blockIdx.x;
  int total = 0, rank;
  for (int64_t at = 0; at < pairs; at += THREADS) {
    const int64_t pair = at + threadIdx.x;
    total += block_count(pair < pairs && ids[pair] == e, &rank);
  }
  if (threadIdx.x == 0) offsets[e + 1] = total;
}
__global__ void prefix_kernel(int32_t* offsets, int64_t experts) {
  int32_t sum = 0;
  offsets[0] = 0;
  for (int64_t e = 1; e <= experts; e++) {
    sum += offsets[e];
    offsets[e] = sum;
  }
}
__global__ void place_kernel(const int32_t* ids, int64_t pairs, const int32_t* offsets, int32_t* pair_of, int32_t* row_of) {
  const int e = blockIdx.x;
  int32_t next = offsets[e];
  for (int64_t at = 0; at < pairs; at += THREADS) {
    const int64_t pair = at + threadIdx.x;
    const bool mine = pair < pairs && ids[pair] == e;
    int rank;
    const int total = block_count(mine, &rank);
    if (mine) {
      pair_of[next + rank] = static_cast<int32_t>(pair);
      row_of[pair] = next + rank;
    }
    next += total;
  }
}

/* One block per token. */
__global__ void route_backward_kernel(RouteBackward p) {
  __shared__ float s[32];
  const int64_t t = blockIdx.x;
  float total = 0;
  for (int64_t j = 0; j < p.top_k; j++) {
    const int64_t pair = t * p.top_k + j, row = p.row_of[pair];
    float sum = 0;
    for (int64_t c = threadIdx.x; c < p.width; c += blockDim.x) sum += load_any(p.act, row * p.act.ld + c) * load_any(p.dact, row * p.dact.ld + c);
    if (p.bias.data) {
      const int64_t e = p.ids[pair] * p.bias.ld;
      for (int64_t c = threadIdx.x; c < p.hidden; c += blockDim.x) sum += load_any(p.dy, row * p.dy.ld + c) * load_any(p.bias, e + c);
    }
    sum = block_sum_all(sum);
    if (threadIdx.x == 0) s[j] = sum;
    total += sum;
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
    float d = p.probabilities.data ? -load_any(p.probabilities, t * p.probabilities.ld + e) * total : 0.0f;
    for (int64_t j = 0; j < p.top_k; j++) {
      const int64_t pair = t * p.top_k + j;
      if (p.ids[pair] == e) d += p.probabilities.data ? s[j] : s[j] - p.weights[pair] * total;
    }
    store_any(p.dlogits, t * p.dlogits.ld + e, d);
  }
}

}  // namespace

int route(const RouteParams& p, cudaStream_t stream) {
  const int64_t pairs = p.tokens * p.top_k;
  if (p.tokens > 0) top_k_kernel<<<static_cast<unsigned>((p.tokens + THREADS - 1) / THREADS), THREADS, 0, stream>>>(p);
  count_kernel<<<static_cast<unsigned>(p.experts), THREADS, 0, stream>>>(p.ids, pairs, p.offsets);
  prefix_kernel<<<1, 1, 0, stream>>>(p.offsets, p.experts);
  place_kernel<<<static_cast<unsigned>(p.experts), THREADS, 0, stream>>>(p.ids, pairs, p.offsets, p.pair_of, p.row_of);
  return cudaGetLastError();
}

int route_backward(const RouteBackward& p, cudaStream_t stream) {
  if (p.top_k > 32) return cudaErrorInvalidValue;
  if (p.tokens > 0) route_backward_kernel<<<static_cast<unsigned>(p.tokens), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace lctx::mlp::cuda
