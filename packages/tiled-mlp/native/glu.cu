/* Gated activations, forward and backward. Arithmetic in f32. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "vectors.cuh"

namespace lctx::mlp::cuda {
namespace {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

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

/* A gate and up of gpt-oss: clamped, and out = (up + 1) gate sigmoid(alpha gate). */
__device__ __forceinline__ float gpt_oss(float gate, float up, float limit, float alpha) {
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return (up + 1.0f) * gate * sigmoid(alpha * gate);
}
__device__ __forceinline__ void gpt_oss_backward(float& gate, float& up, float d, float limit, float alpha) {
  const float g = fminf(gate, limit), u = fminf(fmaxf(up, -limit), limit), s = sigmoid(alpha * g);
  const float dup = fabsf(up) <= limit ? d * g * s : 0.0f;
  gate = gate <= limit ? d * (u + 1.0f) * s * (1.0f + alpha * g * (1.0f - s)) : 0.0f;
  up = dup;
}

/* Where eight neighbouring gates and ups of a row lie: interleaved (gate, up, gate, ...), first the even half; else eight gates, and eight ups. */
template <bool INTERLEAVED>
struct Eight {
  int64_t r, c;
  uint4 *first, *second;
  __device__ __forceinline__ Eight(const Glu& p, const Divide& per_row, uint32_t i) {
    const uint32_t row = per_row(i), eighth = i - row * per_row.by;
    r = row;
    c = eighth * 8;
    first = eight(p.gate, r * p.gate.ld + (INTERLEAVED ? 2 * c : c));
    second = INTERLEAVED ? first + 1 : eight(p.up, r * p.up.ld + c);
  }
  __device__ __forceinline__ void load(float (&v)[16]) const {
    unpack(*first, v);
    unpack(*second, v + 8);
  }
  __device__ __forceinline__ void store(uint4 x, uint4 y) const {
    *first = x;
    *second = y;
  }
};
/* The same of one gate and its up. */
struct One {
  int64_t r, c, at_gate, at_up;
  const DeviceRows& up_rows;
  float gate, up;
  __device__ __forceinline__ One(const Glu& p, bool interleaved, int64_t i)
      : r(i / p.width), c(i % p.width), at_gate(r * p.gate.ld + (interleaved ? 2 * c : c)), at_up(interleaved ? at_gate + 1 : r * p.up.ld + c),
        up_rows(interleaved ? p.gate : p.up), gate(load_any(p.gate, at_gate)), up(load_any(up_rows, at_up)) {}
  __device__ __forceinline__ void store(const Glu& p) const {
    store_any(p.gate, at_gate, gate);
    store_any(up_rows, at_up, up);
  }
};

/* v += eight gates' and ups' bias, rounded to bf16: as forward and backward read them. `e`: where the expert's bias begins. */
template <bool INTERLEAVED>
__device__ __forceinline__ void add_bias(const Glu& p, int64_t e, int64_t c, float (&v)[16]) {
  float bias[16];
  load8(p.bias, e + (INTERLEAVED ? 2 * c : c), bias);
  load8(p.bias, e + (INTERLEAVED ? 2 * c + 8 : p.width + c), bias + 8);
#pragma unroll
  for (int j = 0; j < 16; j++) v[j] += bias[j];
  unpack(pack(v), v);
  unpack(pack(v + 8), v + 8);
}

/* The kernels with `8` take bf16 eight elements a thread; the others any rows. The values are the same. */
template <bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) glu8_kernel(const __grid_constant__ Glu p, const __grid_constant__ Divide per_row, uint32_t count) {
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const Eight<INTERLEAVED> at(p, per_row, i);
  float v[16], out[8];
  at.load(v);
  if (p.bias.data) {
    add_bias<INTERLEAVED>(p, p.ids[p.pair_of[at.r]] * p.bias.ld, at.c, v);
    if (p.keep) at.store(pack(v), pack(v + 8));
  }
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float unused;
    out[j] = INTERLEAVED ? gpt_oss(v[2 * j], v[2 * j + 1], p.limit, p.alpha) : activate(p.activation, v[j], &unused) * v[8 + j];
  }
  *eight(p.out, at.r * p.out.ld + at.c) = pack(out);
}

template <bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) glu_backward8_kernel(const __grid_constant__ Glu p, const __grid_constant__ Divide per_row, uint32_t count) {
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const Eight<INTERLEAVED> at(p, per_row, i);
  float v[16], d[8];
  at.load(v);
  unpack(*eight(p.dout, at.r * p.dout.ld + at.c), d);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    if constexpr (INTERLEAVED) {
      gpt_oss_backward(v[2 * j], v[2 * j + 1], d[j], p.limit, p.alpha);
    } else {
      float derivative;
      const float a = activate(p.activation, v[j], &derivative);
      v[j] = d[j] * v[8 + j] * derivative;
      v[8 + j] = d[j] * a;
    }
  }
  at.store(pack(v), pack(v + 8));
}

/* A warp per row: the bias, which the forward has not added, the gradients, and <activation, dout>, from one read of the row. The activation counts as rounded to bf16, as the
 * down projection's input would be. */
template <bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) glu_backward_rows8_kernel(const __grid_constant__ Glu p) {
  const int64_t r = blockIdx.x * int64_t{THREADS / 32} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (r >= p.rows) return;
  const int64_t e = p.bias.data ? p.ids[p.pair_of[r]] * p.bias.ld : 0;
  float sum = 0;
#pragma unroll 2
  for (int64_t c = lane * 8; c < p.width; c += 256) {
    uint4* first = eight(p.gate, r * p.gate.ld + (INTERLEAVED ? 2 * c : c));
    uint4* second = INTERLEAVED ? first + 1 : eight(p.up, r * p.up.ld + c);
    float v[16], d[8], act[8];
    unpack(*first, v);
    unpack(*second, v + 8);
    unpack(*eight(p.dout, r * p.dout.ld + c), d);
    if (p.bias.data) add_bias<INTERLEAVED>(p, e, c, v);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if constexpr (INTERLEAVED) {
        act[j] = gpt_oss(v[2 * j], v[2 * j + 1], p.limit, p.alpha);
        gpt_oss_backward(v[2 * j], v[2 * j + 1], d[j], p.limit, p.alpha);
      } else {
        float derivative;
        const float a = activate(p.activation, v[j], &derivative);
        act[j] = a * v[8 + j];
        v[j] = d[j] * v[8 + j] * derivative;
        v[8 + j] = d[j] * a;
      }
    }
    unpack(pack(act), act);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += act[j] * d[j];
    *first = pack(v);
    *second = pack(v + 8);
  }
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (lane == 0) p.dots[r] = sum;
}

__device__ __forceinline__ float rounded(const DeviceRows& like, float x) { return like.dtype == LCTX_BF16 ? __bfloat162float(__float2bfloat16(x)) : x; }

/* The same of any rows, a block each. */
__global__ void glu_backward_rows_kernel(Glu p) {
  const bool interleaved = p.activation == kGptOss;
  const int64_t r = blockIdx.x;
  const int64_t e = p.bias.data ? p.ids[p.pair_of[r]] * p.bias.ld : 0;
  float sum = 0;
  for (int64_t c = threadIdx.x; c < p.width; c += blockDim.x) {
    One x(p, interleaved, r * p.width + c);
    if (p.bias.data) {
      x.gate = rounded(p.gate, x.gate + load_any(p.bias, e + (interleaved ? 2 * c : c)));
      x.up = rounded(x.up_rows, x.up + load_any(p.bias, e + (interleaved ? 2 * c + 1 : p.width + c)));
    }
    const float d = load_any(p.dout, r * p.dout.ld + c);
    if (interleaved) {
      sum += rounded(p.dout, gpt_oss(x.gate, x.up, p.limit, p.alpha)) * d;
      gpt_oss_backward(x.gate, x.up, d, p.limit, p.alpha);
    } else {
      float derivative;
      const float a = activate(p.activation, x.gate, &derivative);
      sum += rounded(p.dout, a * x.up) * d;
      x.gate = d * x.up * derivative;
      x.up = d * a;
    }
    x.store(p);
  }
  sum = block_sum_all(sum);
  if (threadIdx.x == 0) p.dots[r] = sum;
}

__global__ void glu_kernel(Glu p) {
  const bool interleaved = p.activation == kGptOss;
  LCTX_GRID_STRIDE(i, p.rows * p.width) {
    One x(p, interleaved, i);
    if (p.bias.data) {
      const int64_t e = p.ids[p.pair_of[x.r]] * p.bias.ld;
      x.gate += load_any(p.bias, e + (interleaved ? 2 * x.c : x.c));
      x.up += load_any(p.bias, e + (interleaved ? 2 * x.c + 1 : p.width + x.c));
      // Rounded as backward will read them.
      if (p.gate.dtype == LCTX_BF16) x.gate = __bfloat162float(__float2bfloat16(x.gate));
      if (x.up_rows.dtype == LCTX_BF16) x.up = __bfloat162float(__float2bfloat16(x.up));
      if (p.keep) x.store(p);
    }
    float unused;
    store_any(p.out, x.r * p.out.ld + x.c, interleaved ? gpt_oss(x.gate, x.up, p.limit, p.alpha) : activate(p.activation, x.gate, &unused) * x.up);
  }
}

__global__ void glu_backward_kernel(Glu p) {
  const bool interleaved = p.activation == kGptOss;
  LCTX_GRID_STRIDE(i, p.rows * p.width) {
    One x(p, interleaved, i);
    const float d = load_any(p.dout, x.r * p.dout.ld + x.c);
    if (interleaved) {
      gpt_oss_backward(x.gate, x.up, d, p.limit, p.alpha);
    } else {
      float derivative;
      const float a = activate(p.activation, x.gate, &derivative);
      x.gate = d * x.up * derivative;
      x.up = d * a;
    }
    x.store(p);
  }
}

}  // namespace

int glu(const Glu& p, cudaStream_t s) {
  if (p.rows * p.width == 0) return 0;
  const bool interleaved = p.activation == kGptOss;
  if (countable(p.rows, p.width) && vectors_bf16(p.gate) && vectors_bf16(p.out) && vectors(p.bias) && (interleaved || vectors_bf16(p.up))) {
    const uint32_t n = eights(p.rows, p.width);
    const Divide per_row(static_cast<uint32_t>(p.width / 8));
    if (interleaved) glu8_kernel<true><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
    else glu8_kernel<false><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
  } else {
    glu_kernel<<<blocks(p.rows * p.width), THREADS, 0, s>>>(p);
  }
  return cudaGetLastError();
}
int glu_backward(const Glu& p, cudaStream_t s) {
  if (p.rows * p.width == 0) return 0;
  const bool interleaved = p.activation == kGptOss;
  const bool wide = p.width % 8 == 0 && vectors_bf16(p.gate) && vectors_bf16(p.dout) && (interleaved || vectors_bf16(p.up));
  if (p.dots) {
    if (wide && vectors(p.bias)) {
      const auto grid = static_cast<unsigned>((p.rows + THREADS / 32 - 1) / (THREADS / 32));
      if (interleaved) glu_backward_rows8_kernel<true><<<grid, THREADS, 0, s>>>(p);
      else glu_backward_rows8_kernel<false><<<grid, THREADS, 0, s>>>(p);
    } else {
      glu_backward_rows_kernel<<<static_cast<unsigned>(p.rows), THREADS, 0, s>>>(p);
    }
  } else if (p.bias.data) {
    return cudaErrorInvalidValue;  // cuda_addon.cc asks for dots with a bias
  } else if (wide && countable(p.rows, p.width)) {
    const uint32_t n = eights(p.rows, p.width);
    const Divide per_row(static_cast<uint32_t>(p.width / 8));
    if (interleaved) glu_backward8_kernel<true><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
    else glu_backward8_kernel<false><<<blocks8(n), THREADS, 0, s>>>(p, per_row, n);
  } else {
    glu_backward_kernel<<<blocks(p.rows * p.width), THREADS, 0, s>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace lctx::mlp::cuda
