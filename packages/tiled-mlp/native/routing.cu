/* Top-k routing. The sort by expert is a counting sort, one block per expert: stable, and the same every time. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "vectors.cuh"

namespace lctx::mlp::cuda {
namespace {

/* For very many experts. One thread per token: k rounds of "largest not taken yet, ties to the lower expert". */
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

/* One warp per token, lane l with experts l, l + 32, ...: k rounds of "largest not taken yet, ties to the lower expert". A NaN counts as the largest, so that it is seen. */
template <int PER_LANE>
__global__ void __launch_bounds__(THREADS) top_k_warp_kernel(RouteParams p) {
  const int64_t t = blockIdx.x * static_cast<int64_t>(THREADS / 32) + threadIdx.x / 32;
  if (t >= p.tokens) return;
  const int lane = threadIdx.x % 32;
  float* z = p.logits + t * p.ldlogits;
  float value[PER_LANE], max = -INFINITY;
  uint32_t free = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int e = lane + i * 32;
    value[i] = e < p.experts ? z[e] : -INFINITY;
    free |= (e < p.experts ? 1u : 0u) << i;
    max = fmaxf(max, value[i]);
  }
  for (int o = 16; o; o >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, o));
  float sum = 0, mine = 0;
  for (int j = 0; j < p.top_k; j++) {
    float best = -INFINITY, logit = 0;
    int expert = INT32_MAX;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const float key = isnan(value[i]) ? INFINITY : value[i];
      if ((free >> i & 1) && (expert == INT32_MAX || key > best)) {
        best = key;
        logit = value[i];
        expert = lane + i * 32;
      }
    }
    for (int o = 16; o; o >>= 1) {
      const float other = __shfl_xor_sync(~0u, best, o), other_logit = __shfl_xor_sync(~0u, logit, o);
      const int other_expert = __shfl_xor_sync(~0u, expert, o);
      if (other_expert != INT32_MAX && (expert == INT32_MAX || other > best || (other == best && other_expert < expert))) {
        best = other;
        logit = other_logit;
        expert = other_expert;
      }
    }
    if (expert % 32 == lane) free &= ~(1u << expert / 32);
    const float weight = expf(logit - max);
    sum += weight;
    if (lane == j) {
      mine = weight;
      p.ids[t * p.top_k + j] = expert;
    }
  }
  if (p.softmax_first) {
    float all = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      value[i] = lane + i * 32 < p.experts ? expf(value[i] - max) : 0.0f;
      all += value[i];
    }
    for (int o = 16; o; o >>= 1) all += __shfl_xor_sync(~0u, all, o);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (lane + i * 32 < p.experts) z[lane + i * 32] = value[i] / all;
    if (!p.normalize) sum = all;
  }
  if (lane < p.top_k) p.weights[t * p.top_k + lane] = mine / sum;
}

__device__ int block_sum(int v) {
  __shared__ int warps[THREADS / 32];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < THREADS / 32; w++) sum += warps[w];
  return sum;
}

constexpr int SEGMENT = THREADS * 32;

/* Bit i of lane l of warp w: pair base + w * 1,024 + l * 32 + i is of expert e; `before`: += how many of the warp's are of lower ones, over lanes. */
__device__ __forceinline__ uint32_t find(const int32_t* ids, int64_t base, int64_t pairs, int e, int* before) {
  const int lane = threadIdx.x % 32;
  const int64_t first = base + threadIdx.x / 32 * 1024;
  uint32_t mask = 0;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int32_t id[16];  // all asked for before the first vote, which the compiler moves no read across
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int64_t at = first + (half * 16 + i) * 32 + lane;
      id[i] = at < pairs ? __ldg(ids + at) : INT32_MAX;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const unsigned hits = __ballot_sync(~0u, id[i] == e);
      if (half * 16 + i == lane) mask = hits;
      *before += id[i] < e;
    }
  }
  return mask;
}

/* Block e finds where its expert's rows begin, and then its pairs in their order. */
__global__ void __launch_bounds__(THREADS) sort_kernel(const int32_t* ids, int64_t pairs, int32_t* offsets, int32_t* pair_of, int32_t* row_of) {
  __shared__ int warps[THREADS / 32];
  const int e = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0, unused = 0;
  uint32_t mask = 0;
  for (int64_t base = 0; base < pairs; base += SEGMENT) mask = find(ids, base, pairs, e, &before);
  int next = block_sum(before);
  if (threadIdx.x == 0) offsets[e] = next;
  for (int64_t base = 0; base < pairs; base += SEGMENT) {
    if (pairs > SEGMENT) mask = find(ids, base, pairs, e, &unused);
    const int count = __popc(mask);
    int place = count;  // of this lane and those below
    for (int o = 1; o < 32; o <<= 1) {
      const int below = __shfl_up_sync(~0u, place, o);
      if (lane >= o) place += below;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = place;
    __syncthreads();
    place += next - count;
    for (int w = 0; w < THREADS / 32; w++) {
      if (w < warp) place += warps[w];
      next += warps[w];
    }
    for (uint32_t left = mask; left; left &= left - 1) {
      const auto pair = static_cast<int32_t>(base + warp * 1024 + lane * 32 + __ffs(static_cast<int>(left)) - 1);
      pair_of[place] = pair;
      row_of[pair] = place++;
    }
  }
  if (threadIdx.x == 0 && e + 1 == static_cast<int>(gridDim.x)) offsets[e + 1] = next;
}

}  // namespace

int route(const RouteParams& p, cudaStream_t stream) {
  const int64_t pairs = p.tokens * p.top_k;
  if (p.tokens > 0) {
    const auto warps = static_cast<unsigned>((p.tokens + THREADS / 32 - 1) / (THREADS / 32));
    if (p.experts <= 32) top_k_warp_kernel<1><<<warps, THREADS, 0, stream>>>(p);
    else if (p.experts <= 64) top_k_warp_kernel<2><<<warps, THREADS, 0, stream>>>(p);
    else if (p.experts <= 128) top_k_warp_kernel<4><<<warps, THREADS, 0, stream>>>(p);
    else if (p.experts <= 512) top_k_warp_kernel<16><<<warps, THREADS, 0, stream>>>(p);
    else top_k_kernel<<<static_cast<unsigned>((p.tokens + THREADS - 1) / THREADS), THREADS, 0, stream>>>(p);
  }
  sort_kernel<<<static_cast<unsigned>(p.experts), THREADS, 0, stream>>>(p.ids, pairs, p.offsets, p.pair_of, p.row_of);
  return cudaGetLastError();
}

}  // namespace lctx::mlp::cuda
