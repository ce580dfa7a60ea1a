/* Rotary position embedding in place, rotate-half. cos and sin of a few tokens are computed once, in f64 as in rope.cc, and applied to all heads. */
#include "lctx/abi.h"
#include "tiles.cuh"

namespace attention::cuda {
namespace {

constexpr int kThreads = 256, kTokens = 8;

/* See rope.cc: the angle as an exact sum of two f64 values, less a multiple of pi / 2 with 106 bits. */
__device__ __forceinline__ float2 rotation(double position, double frequency, double factor) {
  const double angle = position * frequency, rest = fma(position, frequency, -angle);
  const double n = rint(angle * 0.63661977236758134308);
  double r = fma(-n, 1.57079632679489661923, angle);
  r = fma(-n, 6.123233995736766035868820147292e-17, r) + rest;
  const double z = r * r;
  const double s = r * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800))))));
  const double c = 1 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
  const long long quadrant = static_cast<long long>(n);
  const double cosine = quadrant & 1 ? s : c, sine = quadrant & 1 ? c : s;
  return make_float2(static_cast<float>(((quadrant + 1) & 2 ? -cosine : cosine) * factor), static_cast<float>((quadrant & 2 ? -sine : sine) * factor));
}

__device__ __forceinline__ float load(const float* x) { return *x; }
__device__ __forceinline__ float load(const bf16* x) { return __bfloat162float(*x); }
__device__ __forceinline__ void store(float* x, float v) { *x = v; }
__device__ __forceinline__ void store(bf16* x, float v) { *x = __float2bfloat16(v); }

/* V consecutive dims at a time. */
template <class T, int V>
struct alignas(sizeof(T) * V) Pack { T x[V]; };

template <class T, int V>
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ Rope r) {
  extern __shared__ float2 turns[];  // [kTokens, pairs]
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int tokens = static_cast<int>(min(static_cast<int64_t>(kTokens), r.n - token0));
  for (int x = threadIdx.x; x < tokens * r.pairs; x += kThreads) {
    const int64_t token = token0 + x / r.pairs;
    const double position = static_cast<double>(r.start + token - (r.doc_start ? r.doc_start[token] : 0));
    float2 turn = rotation(position, r.inv_freq[x % r.pairs], r.factor);
    turn.y *= r.sign;
    turns[x] = turn;
  }
  __syncthreads();
  const int per_head = r.pairs / V, per_token = r.heads * per_head;
  for (int x = threadIdx.x; x < tokens * per_token; x += kThreads) {
    const int token = x / per_token, rest = x - token * per_token, head = rest / per_head, pair = (rest - head * per_head) * V;
    T* at = static_cast<T*>(r.x) + (token0 + token) * r.stride + static_cast<int64_t>(head) * r.dim + pair;
    auto* first = reinterpret_cast<Pack<T, V>*>(at);
    auto* second = reinterpret_cast<Pack<T, V>*>(at + r.pairs);
    Pack<T, V> a = *first, b = *second;
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float2 turn = turns[token * r.pairs + pair + e];
      const float u = load(&a.x[e]), w = load(&b.x[e]);
      store(&a.x[e], u * turn.x - w * turn.y);
      store(&b.x[e], w * turn.x + u * turn.y);
    }
    *first = a;
    *second = b;
  }
}

template <class T>
int start(const Rope& r, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vector = r.pairs % V == 0 && r.dim % V == 0 && r.stride % V == 0 && reinterpret_cast<uintptr_t>(r.x) % 16 == 0;
  const int64_t blocks = (r.n + kTokens - 1) / kTokens;
  const int bytes = kTokens * r.pairs * static_cast<int>(sizeof(float2));
  return vector ? launch(rope_kernel<T, V>, blocks, kThreads, bytes, r, stream) : launch(rope_kernel<T, 1>, blocks, kThreads, bytes, r, stream);
}

}  // namespace

int rope(const Rope& r, void* stream) { return r.f32 ? start<float>(r, stream) : start<bf16>(r, stream); }

}  // namespace attention::cuda
