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

/* The nearest of 256 rising values; a tie takes the lower. */
__device__ uint8_t nearest(const float* map, float x) {
  int low = 0, high = 255;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (x > (map[middle] + map[middle + 1]) * 0.5f) low = middle + 1;
    else high = middle;
  }
  return static_cast<uint8_t>(low);
}
__device__ float block_max(float v) {
  __shared__ float warps[kStateBlock / 32];
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(kStateBlock / 32); w++) v = fmaxf(v, warps[w]);
  return v;
}
/* One block of threads per block of states. */
__global__ void adamw8_kernel(AdamSegment s, AdamScalars p, const float* maps) {
  const int64_t i = blockIdx.x * kStateBlock + threadIdx.x;
  const bool mine = i < s.n;
  float m = 0, v = 0;
  if (mine) {
    m = maps[s.m8[i]] * s.m_scale[blockIdx.x];
    v = maps[256 + s.v8[i]] * s.v_scale[blockIdx.x];
    s.value[i] = update(p, s.value[i], s.grad[i], &m, &v);
  }
  float m_largest = block_max(fabsf(m)), v_largest = block_max(v);
  if (m_largest < 0x1p-126f) m_largest = 0;
  if (v_largest < 0x1p-126f) v_largest = 0;
  if (mine) {
    s.m8[i] = nearest(maps, m * (m_largest > 0 ? 1.0f / m_largest : 0.0f));
    const uint8_t code = nearest(maps + 256, v * (v_largest > 0 ? 1.0f / v_largest : 0.0f));
    s.v8[i] = code == 0 && v > 0 ? 1 : code;
  }
  if (threadIdx.x == 0) {
    s.m_scale[blockIdx.x] = m_largest;
    s.v_scale[blockIdx.x] = v_largest;
  }
}

__global__ void square_sums_kernel(const float* grad, int64_t n, double* partial) {
  __shared__ double sums[THREADS];
  const int64_t first = blockIdx.x * kChunk;
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
  if (s.m) adamw_kernel<<<blocks(s.n), THREADS, 0, stream>>>(s, p);
  else adamw8_kernel<<<static_cast<unsigned>((s.n + kStateBlock - 1) / kStateBlock), kStateBlock, 0, stream>>>(s, p, maps);
  return cudaGetLastError();
}
int square_sums(const float* grad, int64_t n, double* partial, cudaStream_t s) {
  if (n > 0) square_sums_kernel<<<static_cast<unsigned>((n + kChunk - 1) / kChunk), THREADS, 0, s>>>(grad, n, partial);
  return cudaGetLastError();
}
int add_up(const double* partial, int64_t n, double* total, cudaStream_t s) {
  add_up_kernel<<<1, 1, 0, s>>>(partial, n, total);
  return cudaGetLastError();
}

}  // namespace lc_qlora::cuda
