/* Cross-entropy where blocks form clusters (compute capability 9.0 and up): a row lies in the shared memory of up to eight blocks, is read once and written once. */
#include "lctx/shared_memory.h"
#include "rows.cuh"

namespace lctx::chunked_ce::cuda {
namespace {

constexpr int kMaxPiece = 25'136; /* columns in a block's shared memory: an eighth of gpt-oss's 201,088 words; with the rest of it below 99 KiB */

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}
/* From the same place of another block's shared memory. */
__device__ __forceinline__ float cluster_load(const float* at, int block) {
  float v = 0;
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(v) : "r"(address) : "memory");
#endif
  return v;
}

/* A cluster of `blocks` per row, each with `piece` of its columns in shared memory: the row is read once, and the gradient written once all blocks have read theirs. */
template <bool PLAIN>
__global__ void __launch_bounds__(THREADS, 2) one_read_kernel(Rows p, int blocks, int piece) {
  extern __shared__ __align__(16) float row_piece[];
  __shared__ float warps[THREADS / 32];
  __shared__ Sums mine;
  const int64_t r = blockIdx.x / blocks;
  const int rank = static_cast<int>(blockIdx.x % blocks);
  const int64_t first = static_cast<int64_t>(rank) * piece, left = p.vocab - first;
  const int n = static_cast<int>(left < 0 ? 0 : left < piece ? left : piece), whole = n / 8 * 8;
  float* z = p.logits + r * p.ld;
  const Transform<PLAIN> transform(p);
  const float at_label = rank == 0 && threadIdx.x == 0 ? transform(z[p.labels[r]], p.labels[r]) : 0.0f;

  // A thread meets the same columns in every pass over shared memory.
  float max = -INFINITY, plain = 0, exponentials = 0;
  const auto keep = [&](float v, int j) {
    v = transform(v, first + j);
    max = fmaxf(max, v);
    plain += v;
    return v;
  };
#pragma unroll 4
  for (int j = threadIdx.x * 4; j < whole; j += THREADS * 4) {
    float4 v = *reinterpret_cast<const float4*>(z + first + j);
    v = make_float4(keep(v.x, j), keep(v.y, j + 1), keep(v.z, j + 2), keep(v.w, j + 3));
    *reinterpret_cast<float4*>(row_piece + j) = v;
  }
  if (whole + static_cast<int>(threadIdx.x) < n) row_piece[whole + threadIdx.x] = keep(z[first + whole + threadIdx.x], whole + threadIdx.x);
  for (int o = 16; o; o >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, o));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = max;
  __syncthreads();
  for (int w = 0; w < THREADS / 32; w++) max = fmaxf(max, warps[w]);
  const auto add = [&](float v) {
    const float e = v == -INFINITY ? 0.0f : expf(v - max);
    exponentials += e;  // NaN where v is
    return PLAIN || p.soft_cap <= 0 ? e : v;
  };
#pragma unroll 2
  for (int j = threadIdx.x * 4; j < whole; j += THREADS * 4) {
    float4* at = reinterpret_cast<float4*>(row_piece + j);
    float4 v = *at;
    v = make_float4(add(v.x), add(v.y), add(v.z), add(v.w));
    *at = v;
  }
  if (whole + static_cast<int>(threadIdx.x) < n) row_piece[whole + threadIdx.x] = add(row_piece[whole + threadIdx.x]);
  const float block_exponentials = block_sum_all(exponentials), block_plain = block_sum_all(plain);
  if (threadIdx.x == 0) mine = {max, block_exponentials, block_plain};
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  Sums s{-INFINITY, 0, 0};
  for (int b = 0; b < blocks; b++) s = join(s, {cluster_load(&mine.max, b), cluster_load(&mine.exponentials, b), cluster_load(&mine.plain, b)});
  cluster_arrive();  // waited for at the end: no block may leave while others read its sums

  const Row<PLAIN> row(p, r, s);
  if (rank == 0 && threadIdx.x == 0) p.loss[r] = row.loss(p, s, at_label);
  if (p.gradient) {
    auto* d = reinterpret_cast<__nv_bfloat16*>(z) + first;
    const float factor = row.factor * expf(max - s.max);
    const auto gradient = [&](float v, int j) {
      return row.gradient(PLAIN || p.soft_cap <= 0 ? factor * v : row.factor * expf(v - s.max), v, first + j);
    };
#pragma unroll 2
    for (int j = threadIdx.x * 8; j < whole; j += THREADS * 8) {
      float g[8];
      load<8>(row_piece + j, g);
#pragma unroll
      for (int i = 0; i < 8; i++) g[i] = gradient(g[i], j + i);
      store<8>(d + j, g);
    }
    if (whole + static_cast<int>(threadIdx.x) < n) d[whole + threadIdx.x] = __float2bfloat16(gradient(row_piece[whole + threadIdx.x], whole + threadIdx.x));
  }
  cluster_wait();
}

/* Whether this device runs clusters, and this build has code for them. */
bool clusters() {
  int device = 0, major = 0;
  cudaFuncAttributes attributes{};
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9 &&
         cudaFuncGetAttributes(&attributes, one_read_kernel<true>) == cudaSuccess && attributes.ptxVersion >= 90;
}

/* Columns a block takes so that `blocks` of them hold a row. */
int64_t piece_of(int64_t vocab, int blocks) { return ((vocab + blocks - 1) / blocks + 7) / 8 * 8; }

template <bool PLAIN>
int launch_one_read(const Rows& p, int blocks, cudaStream_t stream) {
  const int64_t piece = piece_of(p.vocab, blocks);
  const int bytes = static_cast<int>(piece * sizeof(float));
  if (const int e = lctx::cuda::allow_shared_memory(reinterpret_cast<const void*>(one_read_kernel<PLAIN>), kMaxPiece * sizeof(float))) return e;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.rows * blocks));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, one_read_kernel<PLAIN>, p, blocks, static_cast<int>(piece));
}

}  // namespace

bool one_read(const Rows& p, cudaStream_t stream, int* status) {
  int blocks = 1;
  while (blocks <= 8 && piece_of(p.vocab, blocks) > kMaxPiece) blocks *= 2;
  if (blocks > 8 || !starts_on_16_bytes(p) || !clusters() || kMaxPiece * static_cast<int64_t>(sizeof(float)) > lctx::cuda::shared_memory_limit()) return false;
  *status = is_plain(p) ? launch_one_read<true>(p, blocks, stream) : launch_one_read<false>(p, blocks, stream);
  return true;
}

}  // namespace lctx::chunked_ce::cuda
