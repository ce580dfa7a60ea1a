/* What the kernels of cross-entropy share: a row's sums, its loss and the gradient of its logits. */
#ifndef LCTX_CHUNKED_CE_ROWS_CUH
#define LCTX_CHUNKED_CE_ROWS_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lctx/device_rows.cuh"

namespace lctx::chunked_ce::cuda {

constexpr int THREADS = 512;

/* A logit with its bias, scaled and capped. PLAIN: there is nothing to do, and no label smoothing either. */
template <bool PLAIN>
struct Transform {
  DeviceRows bias;
  float scale, cap;
  __device__ __forceinline__ explicit Transform(const Rows& p) : bias(p.bias), scale(p.logit_scale), cap(p.soft_cap) {}
  __device__ __forceinline__ float operator()(float v, int64_t j) const {
    if constexpr (PLAIN) return v;
    if (bias.data) v += load_any(bias, j);
    v *= scale;
    return cap > 0 ? cap * tanhf(v / cap) : v;
  }
};

struct Sums {
  float max, exponentials, plain;
};
/* Joins two partial results; NaN stays NaN. */
__device__ __forceinline__ Sums join(Sums a, Sums b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return {max, a.exponentials + b.exponentials, a.plain + b.plain};
  return {max, a.exponentials * expf(a.max - max) + b.exponentials * expf(b.max - max), a.plain + b.plain};
}
/* What a row's sums make of it: its loss, and the gradient of each of its logits. */
template <bool PLAIN>
struct Row {
  float lse, log_sum, weight, factor, uniform, smoothing, scale, cap;
  int64_t label;
  __device__ __forceinline__ Row(const Rows& p, int64_t r, const Sums& s) {
    weight = p.weights ? p.weights[r] : 1.0f;
    log_sum = logf(s.exponentials);
    lse = s.max + log_sum;
    label = p.labels[r];
    smoothing = p.label_smoothing;
    uniform = smoothing / static_cast<float>(p.vocab);
    // Of e^(z - max), not of e^(z - lse): lse is rounded at its own size, which would be an error of every probability.
    factor = (1 + 2 * p.z_loss * lse) / s.exponentials;
    scale = weight * p.inverse_tokens * p.logit_scale;
    cap = p.soft_cap;
  }
  __device__ __forceinline__ float loss(const Rows& p, const Sums& s, float at_label) const {
    float loss = (1 - smoothing) * (log_sum + (s.max - at_label));
    if (smoothing > 0) loss += smoothing * (lse - s.plain / static_cast<float>(p.vocab));
    loss += p.z_loss * lse * lse;
    return weight == 0 ? 0.0f : loss * weight;
  }
  /* `probability`: factor included; v: the logit, where there is a cap. */
  __device__ __forceinline__ float gradient(float probability, float v, int64_t j) const {
    float g = probability - uniform - (j == label ? 1 - smoothing : 0.0f);
    if (!PLAIN && cap > 0) g *= 1 - (v / cap) * (v / cap);
    return weight == 0 ? 0.0f : g * scale;
  }
};

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/* N = 8: rows start on 16 bytes, and eight logits are taken at a time; N = 1: any rows. Columns [*, n) of z; n is a multiple of N but for the last ones. */
template <int N>
__device__ __forceinline__ void load(const float* z, float (&v)[N]) {
  if constexpr (N == 8) {
    const float4 a = reinterpret_cast<const float4*>(z)[0], b = reinterpret_cast<const float4*>(z)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    v[0] = *z;
  }
}
template <int N>
__device__ __forceinline__ void store(__nv_bfloat16* d, const float (&g)[N]) {
  if constexpr (N == 8) *reinterpret_cast<uint4*>(d) = make_uint4(pack(g[0], g[1]), pack(g[2], g[3]), pack(g[4], g[5]), pack(g[6], g[7]));
  else *d = __float2bfloat16(g[0]);
}

/* Rows by clusters of blocks that read them once. False: this device, this build or these rows do not allow it, and nothing was launched. */
bool one_read(const Rows& p, cudaStream_t stream, int* status);
int two_reads(const Rows& p, cudaStream_t stream);
inline bool starts_on_16_bytes(const Rows& p) { return p.ld % 4 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0; }
inline bool is_plain(const Rows& p) { return p.bias.data == nullptr && p.soft_cap <= 0 && p.logit_scale == 1 && p.label_smoothing == 0; }

}  // namespace lctx::chunked_ce::cuda
#endif
