/* The gradient of routing to the router's logits. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "vectors.cuh"

namespace lctx::mlp::cuda {
namespace {

/* Of token t, from its pairs' s and their sum. */
__device__ __forceinline__ void logit_gradients(const RouteBackward& p, int64_t t, const float* s, float total) {
  for (int64_t e = threadIdx.x; e < p.experts; e += blockDim.x) {
    float d = p.probabilities.data ? -load_any(p.probabilities, t * p.probabilities.ld + e) * total : 0.0f;
    for (int64_t j = 0; j < p.top_k; j++) {
      const int64_t pair = t * p.top_k + j;
      if (p.ids[pair] == e) d += p.probabilities.data ? s[j] : s[j] - p.weights[pair] * total;
    }
    store_any(p.dlogits, t * p.dlogits.ld + e, d);
  }
}

/* A block per token, a warp per pair: bf16, eight elements at a time. */
__global__ void route_backward8_kernel(const __grid_constant__ RouteBackward p) {
  __shared__ float s[32];
  const int64_t t = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t pair = t * p.top_k + warp, row = p.row_of[pair];
  float sum = 0;
  const auto dot = [&](const uint4& x, const float* b) {
    float a[8];
    unpack(x, a);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += a[i] * b[i];
  };
  if (p.dots) sum = lane == 0 ? p.dots[row] : 0.0f;
#pragma unroll 4
  for (int64_t c = lane * 8; c < p.width; c += 256) {
    float b[8];
    unpack(__ldg(eight(p.dact, row * p.dact.ld + c)), b);
    dot(__ldg(eight(p.act, row * p.act.ld + c)), b);
  }
  if (p.bias.data) {
    const int64_t e = p.ids[pair] * p.bias.ld;
#pragma unroll 4
    for (int64_t c = lane * 8; c < p.hidden; c += 256) {
      float b[8];
      load8(p.bias, e + c, b);
      dot(__ldg(eight(p.dy, row * p.dy.ld + c)), b);
    }
  }
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (lane == 0) s[warp] = sum;
  __syncthreads();
  float total = 0;
  for (int64_t j = 0; j < p.top_k; j++) total += s[j];
  logit_gradients(p, t, s, total);
}

/* Any rows. One block per token. */
__global__ void route_backward_kernel(RouteBackward p) {
  __shared__ float s[32];
  const int64_t t = blockIdx.x;
  float total = 0;
  for (int64_t j = 0; j < p.top_k; j++) {
    const int64_t pair = t * p.top_k + j, row = p.row_of[pair];
    float sum = p.dots && threadIdx.x == 0 ? p.dots[row] : 0.0f;
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
  logit_gradients(p, t, s, total);
}

}  // namespace

int route_backward(const RouteBackward& p, cudaStream_t stream) {
  if (p.top_k > 32) return cudaErrorInvalidValue;
  if (p.tokens == 0) return 0;
  const bool wide = p.width % 8 == 0 && (p.bias.data == nullptr || p.hidden % 8 == 0) && vectors_bf16(p.act) && vectors_bf16(p.dact) && vectors(p.bias) &&
                    (p.bias.data == nullptr || vectors_bf16(p.dy));
  if (wide) route_backward8_kernel<<<static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.top_k * 32), 0, stream>>>(p);
  else route_backward_kernel<<<static_cast<unsigned>(p.tokens), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace lctx::mlp::cuda
