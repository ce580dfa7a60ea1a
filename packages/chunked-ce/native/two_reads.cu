/* Cross-entropy, one block per row, which is read twice: for any card and any rows. */
#include "rows.cuh"

namespace lctx::chunked_ce::cuda {
namespace {

/* Over the block, the same for every thread. */
__device__ __forceinline__ Sums join_block(Sums s) {
  __shared__ Sums partial[THREADS / 32];
  for (int o = 16; o; o >>= 1)
    s = join(s, {__shfl_xor_sync(~0u, s.max, o), __shfl_xor_sync(~0u, s.exponentials, o), __shfl_xor_sync(~0u, s.plain, o)});
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = s;
  __syncthreads();
  s = partial[0];
  for (int w = 1; w < THREADS / 32; w++) s = join(s, partial[w]);
  return s;
}

/* Once for maximum and sum together, and once for the gradient. */
template <int N, bool PLAIN>
__global__ void __launch_bounds__(THREADS, 2) two_reads_kernel(Rows p) {
  const int64_t r = blockIdx.x, whole = p.vocab / N * N;
  float* z = p.logits + r * p.ld;
  const Transform<PLAIN> transform(p);
  const float at_label = transform(z[p.labels[r]], p.labels[r]);

  Sums s{-INFINITY, 0, 0};
  const auto take = [&](const float* v, int count, int64_t j) {
    float t[N], max = s.max;
#pragma unroll
    for (int i = 0; i < count; i++) {
      t[i] = transform(v[i], j + i);
      s.plain += t[i];
      max = fmaxf(max, t[i]);
    }
    if (max > s.max) {
      s.exponentials *= expf(s.max - max);
      s.max = max;
    }
#pragma unroll
    for (int i = 0; i < count; i++) s.exponentials += t[i] == -INFINITY ? 0.0f : expf(t[i] - s.max);  // also where t is NaN
  };
#pragma unroll 2
  for (int64_t j = threadIdx.x * N; j < whole; j += THREADS * N) {
    float v[N];
    load<N>(z + j, v);
    take(v, N, j);
  }
  if (N > 1 && whole + threadIdx.x < p.vocab) take(z + whole + threadIdx.x, 1, whole + threadIdx.x);
  s = join_block(s);
  const Row<PLAIN> row(p, r, s);
  if (threadIdx.x == 0) p.loss[r] = row.loss(p, s, at_label);
  if (!p.gradient) return;

  auto* d = reinterpret_cast<__nv_bfloat16*>(z);
  const auto gradient = [&](float logit, int64_t j) {
    const float v = transform(logit, j);
    return row.gradient(row.factor * expf(v - s.max), v, j);
  };
  // The gradient of columns [first, 2 first) goes over the logits of [first / 2, first): all threads must have read those, no more.
  float g[N], last = 0;
  const int64_t mine = threadIdx.x * N;
  if (mine < whole) {
    load<N>(z + mine, g);
#pragma unroll
    for (int i = 0; i < N; i++) g[i] = gradient(g[i], mine + i);
  }
  if (N > 1 && whole + threadIdx.x < p.vocab) last = gradient(z[whole + threadIdx.x], whole + threadIdx.x);
  __syncthreads();
  if (mine < whole) store<N>(d + mine, g);
  for (int64_t first = THREADS * N; first < whole; first *= 2) {
    __syncthreads();
#pragma unroll 2
    for (int64_t j = first + mine; j < whole && j < 2 * first; j += THREADS * N) {
      load<N>(z + j, g);
#pragma unroll
      for (int i = 0; i < N; i++) g[i] = gradient(g[i], j + i);
      store<N>(d + j, g);
    }
  }
  if (N > 1) {
    __syncthreads();
    if (whole + threadIdx.x < p.vocab) d[whole + threadIdx.x] = __float2bfloat16(last);
  }
}

}  // namespace

int two_reads(const Rows& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(p.rows);
  if (starts_on_16_bytes(p)) {
    if (is_plain(p)) two_reads_kernel<8, true><<<grid, THREADS, 0, stream>>>(p);
    else two_reads_kernel<8, false><<<grid, THREADS, 0, stream>>>(p);
  } else {
    if (is_plain(p)) two_reads_kernel<1, true><<<grid, THREADS, 0, stream>>>(p);
    else two_reads_kernel<1, false><<<grid, THREADS, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace lctx::chunked_ce::cuda
