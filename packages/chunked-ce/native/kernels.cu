/* One block per row of logits: one pass for maximum and sum together, one for the gradient, which is written as bf16 over the f32 it was made from. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lctx/device_rows.cuh"

namespace lctx::chunked_ce::cuda {
namespace {

constexpr int THREADS = 512;

__device__ __forceinline__ float transformed(const Rows& p, const float* z, int64_t j) {
  float v = z[j];
  if (p.bias.data) v += load_any(p.bias, j);
  v *= p.logit_scale;
  return p.soft_cap > 0 ? p.soft_cap * tanhf(v / p.soft_cap) : v;
}

struct Sums {
  float max, exponentials, plain;
};
/* Joins two partial results; NaN stays NaN. */
__device__ __forceinline__ Sums join(Sums a, Sums b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return {max, a.exponentials + b.exponentials, a.plain + b.plain};
  return {max, a.exponentials * expf(a.max - max) + b.exponentials * expf(b.max - max), a.plain + b.plain};
}

__global__ void __launch_bounds__(THREADS) cross_entropy_kernel(Rows p) {
  __shared__ Sums partial[THREADS / 32];
  const int64_t r = blockIdx.x;
  float* z = p.logits + r * p.ld;
  const float weight = p.weights ? p.weights[r] : 1.0f, eps = p.label_smoothing;
  const int32_t label = p.labels[r];
  const float at_label = transformed(p, z, label);

  Sums s{-INFINITY, 0, 0};
  for (int64_t j = threadIdx.x; j < p.vocab; j += THREADS) {
    const float v = transformed(p, z, j);
    s.plain += v;
    if (v > s.max) {
      s.exponentials = s.exponentials * expf(s.max - v) + 1.0f;
      s.max = v;
    } else {
      s.exponentials += expf(v - s.max);  // also where v is NaN
    }
  }
  for (int o = 16; o; o >>= 1)
    s = join(s, {__shfl_xor_sync(~0u, s.max, o), __shfl_xor_sync(~0u, s.exponentials, o), __shfl_xor_sync(~0u, s.plain, o)});
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = s;
  __syncthreads();
  s = partial[0];
  for (int w = 1; w < THREADS / 32; w++) s = join(s, partial[w]);

  const float log_sum = logf(s.exponentials), lse = s.max + log_sum;
  if (threadIdx.x == 0) {
    float loss = (1 - eps) * (log_sum + (s.max - at_label));
    if (eps > 0) loss += eps * (lse - s.plain / static_cast<float>(p.vocab));
    loss += p.z_loss * lse * lse;
    p.loss[r] = weight == 0 ? 0.0f : loss * weight;
  }
  if (!p.gradient) return;
  const float factor = 1 + 2 * p.z_loss * lse, uniform = eps / static_cast<float>(p.vocab), scale = weight * p.inverse_tokens * p.logit_scale;
  auto* d = reinterpret_cast<__nv_bfloat16*>(z);
  // Tile by tile: every thread has read its logits before any writes over them, and later tiles lie beyond what this one writes.
  for (int64_t j0 = 0; j0 < p.vocab; j0 += THREADS) {
    const int64_t j = j0 + threadIdx.x;
    float g = 0;
    if (j < p.vocab && weight != 0) {
      const float v = transformed(p, z, j);
      g = factor * expf(v - lse) - uniform - (j == label ? 1 - eps : 0.0f);
      if (p.soft_cap > 0) g *= 1 - (v / p.soft_cap) * (v / p.soft_cap);
      g *= scale;
    }
    __syncthreads();
    if (j < p.vocab) d[j] = __float2bfloat16(g);
  }
}

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

__global__ void move_kernel(Move p) {
  const int64_t i = blockIdx.x, at = p.index[i];
  const char* src = static_cast<const char*>(p.src) + (p.gather ? at : i) * p.ldsrc;
  char* dst = static_cast<char*>(p.dst) + (p.gather ? i : at) * p.lddst;
  for (int64_t b = threadIdx.x * 2; b < p.bytes; b += blockDim.x * 2) *reinterpret_cast<uint16_t*>(dst + b) = *reinterpret_cast<const uint16_t*>(src + b);
}

}  // namespace

int cross_entropy_rows(const Rows& p, cudaStream_t stream) {
  if (p.rows == 0) return 0;
  cross_entropy_kernel<<<static_cast<unsigned>(p.rows), THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}
int add_losses(const float* loss, int64_t rows, float* sum, cudaStream_t stream) {
  add_losses_kernel<<<1, 256, 0, stream>>>(loss, rows, sum);
  return cudaGetLastError();
}
int move_rows(const Move& p, cudaStream_t stream) {
  if (p.rows == 0) return 0;
  move_kernel<<<static_cast<unsigned>(p.rows), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace lctx::chunked_ce::cuda
