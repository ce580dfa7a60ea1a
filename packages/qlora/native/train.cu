/* Dropout, regrouping of fused-expert LoRA, AdamW, gradient norm. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lctx/device_rows.cuh"
#include "philox.h"

namespace lc_qlora::cuda {
namespace {

constexpr int THREADS = 256;
unsigned blocks(int64_t n) {
  const int64_t b = (n + THREADS - 1) / THREADS;
  return static_cast<unsigned>(b < 132 * 32 ? b : 132 * 32);
}
#define LC_GRID_STRIDE(i, n) \
  for (int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; i < (n); i += static_cast<int64_t>(gridDim.x) * THREADS)

/* The same counters and words as the CPU's dropout_row: four features a call. */
__device__ __forceinline__ void philox4(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key, uint32_t (&w)[4]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t a_high = __umulhi(0xD2511F53u, w[0]), a_low = 0xD2511F53u * w[0], b_high = __umulhi(0xCD9E8D57u, w[2]), b_low = 0xCD9E8D57u * w[2];
    w[0] = b_high ^ w[1] ^ k0;
    w[1] = b_low;
    w[2] = a_high ^ w[3] ^ k1;
    w[3] = a_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

__global__ void dropout_kernel(DropoutRows p) {
  const int64_t quads = (p.width + 3) / 4;
  LC_GRID_STRIDE(i, p.rows * quads) {
    const int64_t row = i / quads, q = i % quads;
    const uint64_t token = p.start + static_cast<uint64_t>(row);
    uint32_t w[4];
    philox4(static_cast<uint32_t>(q), static_cast<uint32_t>(token), static_cast<uint32_t>(token >> 32), p.site, p.seed, w);
    for (int64_t j = 0; j < 4 && q * 4 + j < p.width; j++) {
      const int64_t f = q * 4 + j;
      const float v = w[j] >= p.threshold ? lctx::load_any(p.x, row * p.x.ld + f) * p.scale : 0.0f;
      const int64_t at = row * p.out.ld + f;
      lctx::store_any(p.out, at, p.accumulate ? lctx::load_any(p.out, at) + v : v);
    }
  }
}

__global__ void expert_b_kernel(ExpertB p, bool gather) {
  LC_GRID_STRIDE(i, p.experts * p.out * p.rank) {
    const int64_t k = i % p.rank, o = i / p.rank % p.out, e = i / p.rank / p.out;
    float* b = p.b + (o * p.rank + k) * p.experts + e;
    if (gather) p.grouped[i] = *b;
    else *b += p.grouped[i];
  }
}

__device__ __forceinline__ float update(const AdamScalars& p, float value, float g, float* m, float* v) {
  g *= p.grad_scale;
  *m += (g - *m) * p.rest1;
  *v = *v * p.beta2 + p.rest2 * g * g;
  return value * p.decay - p.step_size * (*m / (sqrtf(*v) / p.root_bias2 + p.eps));
}
__global__ void adamw_kernel(AdamSegment s, AdamScalars p) {
  LC_GRID_STRIDE(i, s.n) {
    float m = s.m[i], v = s.v[i];
    s.value[i] = update(p, s.value[i], s.grad[i], &m, &v);
    s.m[i] = m;
    s.v[i] = v;
  }
}
/* Four neighbours a thread, of tensors that start on 16 bytes; the last few are left to the first threads. */
__global__ void __launch_bounds__(THREADS) adamw4_kernel(AdamSegment s, AdamScalars p) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x, whole = s.n / 4;
  if (i < whole) {
    float4 value = reinterpret_cast<const float4*>(s.value)[i], m = reinterpret_cast<const float4*>(s.m)[i], v = reinterpret_cast<const float4*>(s.v)[i];
    const float4 grad = __ldg(reinterpret_cast<const float4*>(s.grad) + i);
    value.x = update(p, value.x, grad.x, &m.x, &v.x);
    value.y = update(p, value.y, grad.y, &m.y, &v.y);
    value.z = update(p, value.z, grad.z, &m.z, &v.z);
    value.w = update(p, value.w, grad.w, &m.w, &v.w);
    reinterpret_cast<float4*>(s.value)[i] = value;
    reinterpret_cast<float4*>(s.m)[i] = m;
    reinterpret_cast<float4*>(s.v)[i] = v;
  }
  const int64_t rest = whole * 4 + i;
  if (rest < s.n && i < 4) {
    float m = s.m[rest], v = s.v[rest];
    s.value[rest] = update(p, s.value[rest], s.grad[rest], &m, &v);
    s.m[rest] = m;
    s.v[rest] = v;
  }
}

/* A map of 256 rising values and the middles between them, spread such that a binary search by a warp's lanes meets few bank conflicts. */
struct Map {
  float values[256], middles[256 + 8];
  __device__ void fill(const float* map) {
    const int i = threadIdx.x % 256;
    values[i] = map[i];
    middles[i + i / 32] = i < 255 ? (map[i] + map[i + 1]) * 0.5f : INFINITY;
  }
  /* The nearest value's number; a tie takes the lower. */
  __device__ __forceinline__ uint32_t nearest(float x) const {
    uint32_t low = 0;
#pragma unroll
    for (uint32_t step = 128; step; step /= 2) {
      const uint32_t at = low + step - 1;
      if (x > middles[at + at / 32]) low += step;
    }
    return low;
  }
};
__device__ __forceinline__ float warp_max(float v) {
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  return v;
}

/* A warp per block of states, eight neighbours a lane. VECTOR: all tensors start on 16 bytes. */
template <bool VECTOR>
__global__ void __launch_bounds__(THREADS) adamw8_kernel(AdamSegment s, AdamScalars p, const float* maps) {
  static_assert(kStateBlock == 256 && THREADS == 256, "a lane takes eight states, and the threads fill a map");
  __shared__ Map m_map, v_map;
  m_map.fill(maps);
  v_map.fill(maps + 256);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t block = blockIdx.x * static_cast<int64_t>(THREADS / 32) + threadIdx.x / 32, first = block * kStateBlock + lane * 8;
  if (block * kStateBlock >= s.n) return;
  const bool wide = VECTOR && (block + 1) * kStateBlock <= s.n;
  const int count = static_cast<int>(s.n - first < 8 ? (s.n - first < 0 ? 0 : s.n - first) : 8);

  alignas(16) float value[8] = {}, grad[8] = {};
  alignas(8) uint8_t m8[8] = {}, v8[8] = {};
  float m[8] = {}, v[8] = {};
  if (wide) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      reinterpret_cast<float4*>(value)[h] = reinterpret_cast<const float4*>(s.value + first)[h];
      reinterpret_cast<float4*>(grad)[h] = reinterpret_cast<const float4*>(s.grad + first)[h];
    }
    *reinterpret_cast<uint2*>(m8) = *reinterpret_cast<const uint2*>(s.m8 + first);
    *reinterpret_cast<uint2*>(v8) = *reinterpret_cast<const uint2*>(s.v8 + first);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < count) value[i] = s.value[first + i], grad[i] = s.grad[first + i], m8[i] = s.m8[first + i], v8[i] = s.v8[first + i];
  }
  const float m_scale = s.m_scale[block], v_scale = s.v_scale[block];
  float m_largest = 0, v_largest = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (i >= count) continue;
    m[i] = m_map.values[m8[i]] * m_scale;
    v[i] = v_map.values[v8[i]] * v_scale;
    value[i] = update(p, value[i], grad[i], &m[i], &v[i]);
    m_largest = fmaxf(m_largest, fabsf(m[i]));
    v_largest = fmaxf(v_largest, v[i]);
  }
  m_largest = warp_max(m_largest);
  v_largest = warp_max(v_largest);
  if (m_largest < 0x1p-126f) m_largest = 0;
  if (v_largest < 0x1p-126f) v_largest = 0;
  const float m_inverse = m_largest > 0 ? 1.0f / m_largest : 0.0f, v_inverse = v_largest > 0 ? 1.0f / v_largest : 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    m8[i] = static_cast<uint8_t>(m_map.nearest(m[i] * m_inverse));
    const uint32_t code = v_map.nearest(v[i] * v_inverse);
    v8[i] = static_cast<uint8_t>(code == 0 && v[i] > 0 ? 1 : code);
  }
  if (wide) {
#pragma unroll
    for (int h = 0; h < 2; h++) reinterpret_cast<float4*>(s.value + first)[h] = reinterpret_cast<const float4*>(value)[h];
    *reinterpret_cast<uint2*>(s.m8 + first) = *reinterpret_cast<const uint2*>(m8);
    *reinterpret_cast<uint2*>(s.v8 + first) = *reinterpret_cast<const uint2*>(v8);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < count) s.value[first + i] = value[i], s.m8[first + i] = m8[i], s.v8[first + i] = v8[i];
  }
  if (lane == 0) {
    s.m_scale[block] = m_largest;
    s.v_scale[block] = v_largest;
  }
}

/* A block per chunk. */
__global__ void square_sums_kernel(const __grid_constant__ Gradients g, double* partial) {
  __shared__ double sums[THREADS];
  int t = 0;
  while (blockIdx.x >= g.chunks[t + 1]) t++;
  const float* grad = g.at[t];
  const int64_t n = g.n[t], first = int64_t{blockIdx.x - g.chunks[t]} * kChunk;
  double s = 0;
  for (int64_t i = first + threadIdx.x; i < n && i < first + kChunk; i += THREADS) s += static_cast<double>(grad[i]) * grad[i];
  sums[threadIdx.x] = s;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}
__global__ void add_up_kernel(const double* partial, int64_t n, double* total) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += partial[i];
  *total = s;
}

}  // namespace

int dropout(const DropoutRows& p, cudaStream_t s) {
  if (p.rows * p.width == 0) return 0;
  dropout_kernel<<<blocks(p.rows * ((p.width + 3) / 4)), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}
int gather_expert_b(const ExpertB& p, cudaStream_t s) {
  expert_b_kernel<<<blocks(p.experts * p.out * p.rank), THREADS, 0, s>>>(p, true);
  return cudaGetLastError();
}
int scatter_expert_b(const ExpertB& p, cudaStream_t s) {
  expert_b_kernel<<<blocks(p.experts * p.out * p.rank), THREADS, 0, s>>>(p, false);
  return cudaGetLastError();
}
int adamw(const AdamSegment& s, const AdamScalars& p, const float* maps, cudaStream_t stream) {
  if (s.n == 0) return 0;
  const auto on_16_bytes = [](auto... pointers) { return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0; };
  if (s.m) {
    const bool wide = on_16_bytes(s.value, s.grad, s.m, s.v);
    if (wide) adamw4_kernel<<<static_cast<unsigned>((s.n / 4 + THREADS) / THREADS), THREADS, 0, stream>>>(s, p);
    else adamw_kernel<<<blocks(s.n), THREADS, 0, stream>>>(s, p);
  } else {
    constexpr int64_t kPerBlock = THREADS / 32 * kStateBlock;
    const auto grid = static_cast<unsigned>((s.n + kPerBlock - 1) / kPerBlock);
    if (on_16_bytes(s.value, s.grad, s.m8, s.v8)) adamw8_kernel<true><<<grid, THREADS, 0, stream>>>(s, p, maps);
    else adamw8_kernel<false><<<grid, THREADS, 0, stream>>>(s, p, maps);
  }
  return cudaGetLastError();
}
int square_sums(const Gradients& g, double* partial, cudaStream_t s) {
  const uint32_t blocks = g.chunks[g.count];
  if (blocks > 0) square_sums_kernel<<<blocks, THREADS, 0, s>>>(g, partial);
  return cudaGetLastError();
}
int add_up(const double* partial, int64_t n, double* total, cudaStream_t s) {
  add_up_kernel<<<1, 1, 0, s>>>(partial, n, total);
  return cudaGetLastError();
}

}  // namespace lc_qlora::cuda
