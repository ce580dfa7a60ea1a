/* Gated activations and the movement of rows between tokens and experts. Arithmetic in f32; sums over a token's experts run in order. */
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_kernels.h"
#include "lctx/device_rows.cuh"

namespace lctx::mlp::cuda {
namespace {

constexpr int THREADS = 256;
unsigned blocks(int64_t n) { return static_cast<unsigned>(std::min<int64_t>((n + THREADS - 1) / THREADS, 132 * 32)); }
#define LCTX_GRID_STRIDE(i, n) \
  for (int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; i < (n); i += static_cast<int64_t>(gridDim.x) * THREADS)

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

/* value and derivative of the dense activations */
__device__ __forceinline__ float activate(int32_t kind, float x, float* derivative) {
  if (kind == kSilu) {
    const float s = sigmoid(x);
    *derivative = s * (1.0f + x * (1.0f - s));
    return x * s;
  }
  if (kind == kGeluErf) {
    const float cdf = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    *derivative = cdf + x * 0.39894228040143268f * __expf(-0.5f * x * x);
    return x * cdf;
  }
  const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x), t = tanhf(inner);
  *derivative = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456080286536f * (1.0f + 3.0f * 0.044715f * x * x);
  return 0.5f * x * (1.0f + t);
}

__global__ void glu_kernel(Glu p) {
  const bool interleaved = p.activation == kGptOss;
  LCTX_GRID_STRIDE(i, p.rows * p.width) {
    const int64_t r = i / p.width, c = i % p.width;
    const int64_t at_gate = r * p.gate.ld + (interleaved ? 2 * c : c), at_up = interleaved ? at_gate + 1 : r * p.up.ld + c;
    const DeviceRows& up_rows = interleaved ? p.gate : p.up;
    float gate = load_any(p.gate, at_gate), up = load_any(up_rows, at_up);
    if (p.bias.data) {
      const int64_t e = p.ids[p.pair_of[r]] * p.bias.ld;
      gate += load_any(p.bias, e + (interleaved ? 2 * c : c));
      up += load_any(p.bias, e + (interleaved ? 2 * c + 1 : p.width + c));
      store_any(p.gate, at_gate, gate);  // backward wants them with the bias
      store_any(up_rows, at_up, up);
      gate = load_any(p.gate, at_gate);  // as backward will read them
      up = load_any(up_rows, at_up);
    }
    float out, unused;
    if (interleaved) {
      gate = fminf(gate, p.limit);
      up = fminf(fmaxf(up, -p.limit), p.limit);
      out = (up + 1.0f) * gate * sigmoid(p.alpha * gate);
    } else {
      out = activate(p.activation, gate, &unused) * up;
    }
    store_any(p.out, r * p.out.ld + c, out);
  }
}

__global__ void glu_backward_kernel(Glu p) {
  const bool interleaved = p.activation == kGptOss;
  LCTX_GRID_STRIDE(i, p.rows * p.width) {
    const int64_t r = i / p.width, c = i % p.width;
    const int64_t at_gate = r * p.gate.ld + (interleaved ? 2 * c : c), at_up = interleaved ? at_gate + 1 : r * p.up.ld + c;
    const DeviceRows& up_rows = interleaved ? p.gate : p.up;
    const float gate = load_any(p.gate, at_gate), up = load_any(up_rows, at_up), d = load_any(p.dout, r * p.dout.ld + c);
    float dgate, dup;
    if (interleaved) {
      const float g = fminf(gate, p.limit), u = fminf(fmaxf(up, -p.limit), p.limit), s = sigmoid(p.alpha * g);
      dup = fabsf(up) <= p.limit ? d * g * s : 0.0f;
      dgate = gate <= p.limit ? d * (u + 1.0f) * s * (1.0f + p.alpha * g * (1.0f - s)) : 0.0f;
    } else {
      float derivative;
      const float a = activate(p.activation, gate, &derivative);
      dup = d * a;
      dgate = d * up * derivative;
    }
    store_any(p.gate, at_gate, dgate);
    store_any(up_rows, at_up, dup);
  }
}

__global__ void gather_kernel(Gather p) {
  LCTX_GRID_STRIDE(i, p.rows * p.width) {
    const int64_t r = i / p.width, c = i % p.width;
    const int32_t pair = p.pair_of[r];
    const float v = load_any(p.x, pair / p.top_k * p.x.ld + c);
    store_any(p.out, r * p.out.ld + c, p.weights ? v * p.weights[pair] : v);
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

int glu(const Glu& p, cudaStream_t s) {
  if (p.rows * p.width == 0) return 0;
  glu_kernel<<<blocks(p.rows * p.width), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}
int glu_backward(const Glu& p, cudaStream_t s) {
  if (p.rows * p.width == 0) return 0;
  glu_backward_kernel<<<blocks(p.rows * p.width), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}
int gather(const Gather& p, cudaStream_t s) {
  if (p.rows * p.width == 0) return 0;
  gather_kernel<<<blocks(p.rows * p.width), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}
int combine(const Combine& p, cudaStream_t s) {
  if (p.tokens * p.width == 0) return 0;
  combine_kernel<<<blocks(p.tokens * p.width), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}

}  // namespace lctx::mlp::cuda
