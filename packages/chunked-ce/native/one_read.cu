/* Cross-entropy where blocks form clusters (compute capability 9.0 and up): a row lies in the shared memory of up to eight blocks, is read once and written once. */
#include <map>
#include <mutex>
#include <tuple>

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

__device__ __forceinline__ void fetch(float* to, const float* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}

/* A maximum and a sum of exponentials relative to it, as a thread meets its logits. */
template <bool PLAIN>
struct Running {
  Sums s{-INFINITY, 0, 0};
  template <int N>
  __device__ __forceinline__ void take(const float (&v)[N]) {
    float max = s.max;
#pragma unroll
    for (int i = 0; i < N; i++) max = fmaxf(max, v[i]);
    if (max > s.max) {
      s.exponentials *= __expf(s.max - max);
      s.max = max;
    }
    if (max == -INFINITY) {  // nothing but words that cannot be, or NaN
#pragma unroll
      for (int i = 0; i < N; i++) s.exponentials += v[i] == -INFINITY ? 0.0f : v[i];
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) s.exponentials += __expf(v[i] - max);
    }
    if constexpr (!PLAIN) {
#pragma unroll
      for (int i = 0; i < N; i++) s.plain += v[i];
    }
  }
};
/* Over `lanes` neighbouring lanes. */
__device__ __forceinline__ Sums join_lanes(Sums s, int lanes) {
  float max = s.max;
  for (int o = lanes / 2; o; o >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, o));
  float exponentials = s.max == max ? s.exponentials : s.exponentials * expf(s.max - max);
  for (int o = lanes / 2; o; o >>= 1) {
    exponentials += __shfl_xor_sync(~0u, exponentials, o);
    s.plain += __shfl_xor_sync(~0u, s.plain, o);
  }
  return {max, exponentials, s.plain};
}

/* Clusters of `blocks` blocks take rows in turn, each block `piece` columns of them. A thread meets the same columns, four at a time, in all that is done to a row: as soon as it
 * has written their gradient it asks for those of the next row, so that memory is read while it is written. No gradient is written before all blocks have their
 * logits: that is what the cluster's barrier is for, besides the sums. */
template <bool PLAIN>
__global__ void __launch_bounds__(THREADS, 2) one_read_kernel(Rows p, int blocks, int piece) {
  extern __shared__ __align__(16) float row_piece[];
  __shared__ Sums warps[THREADS / 32];
  __shared__ Sums mine[2];  // of this row and of the one before it, which other blocks may still be reading
  const int rank = static_cast<int>(blockIdx.x % blocks), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t stride = gridDim.x / blocks, first = static_cast<int64_t>(rank) * piece, left = p.vocab - first;
  const int n = static_cast<int>(left < 0 ? 0 : left < piece ? left : piece), whole = n / 4 * 4, rest = whole + static_cast<int>(threadIdx.x);
  const Transform<PLAIN> transform(p);
  const auto row_of = [&](int64_t r) { return p.logits + r * p.ld; };

  int64_t r = blockIdx.x / blocks;
  for (int j = threadIdx.x * 4; j < whole; j += THREADS * 4) fetch(row_piece + j, row_of(r) + first + j);
  for (int parity = 0; r < p.rows; r += stride, parity ^= 1) {
    float* z = row_of(r);
    const int32_t label = p.labels[r];
    float at_label = 0, last = 0;
    if (rank == 0 && threadIdx.x == 0) at_label = transform(z[label], label);
    if (rest < n) last = z[first + rest];
    Running<PLAIN> running;
    asm volatile("cp.async.wait_all;\n" ::: "memory");
#pragma unroll 2
    for (int j = threadIdx.x * 4; j < whole; j += THREADS * 4) {
      float4* at = reinterpret_cast<float4*>(row_piece + j);
      const float4 x = *at;
      float v[4] = {transform(x.x, first + j), transform(x.y, first + j + 1), transform(x.z, first + j + 2), transform(x.w, first + j + 3)};
      if constexpr (!PLAIN) *at = make_float4(v[0], v[1], v[2], v[3]);
      running.take(v);
    }
    if (rest < n) {
      last = transform(last, first + rest);
      const float v[1] = {last};
      running.take(v);
    }
    Sums s = join_lanes(running.s, 32);
    if (lane == 0) warps[warp] = s;
    __syncthreads();
    if (warp == 0) {
      s = join_lanes(warps[lane % (THREADS / 32)], THREADS / 32);
      if (lane == 0) mine[parity] = s;
    }
    cluster_arrive();
    cluster_wait();
    float max[8], exponentials[8], plain[8];
#pragma unroll
    for (int b = 0; b < 8; b++) {
      const int from = b < blocks ? b : 0;
      max[b] = cluster_load(&mine[parity].max, from);
      exponentials[b] = cluster_load(&mine[parity].exponentials, from);
      plain[b] = PLAIN ? 0.0f : cluster_load(&mine[parity].plain, from);
    }
    s = {max[0], 0, 0};
#pragma unroll
    for (int b = 1; b < 8; b++) s.max = fmaxf(s.max, max[b]);
#pragma unroll
    for (int b = 0; b < 8; b++) {
      if (b >= blocks) continue;
      s.exponentials += max[b] == s.max ? exponentials[b] : exponentials[b] * expf(max[b] - s.max);
      s.plain += plain[b];
    }

    const Row<PLAIN> row(p, r, s);
    if (rank == 0 && threadIdx.x == 0) p.loss[r] = row.loss(p, s, at_label);
    const float* next = r + stride < p.rows ? row_of(r + stride) + first : nullptr;
    if (!p.gradient) {
      for (int j = threadIdx.x * 4; next && j < whole; j += THREADS * 4) fetch(row_piece + j, next + j);
      continue;
    }
    auto* d = reinterpret_cast<__nv_bfloat16*>(z) + first;
    const int64_t label_here = label - first;
    const float factor = row.factor * row.scale;
    const auto gradient = [&](float v, int j) {
      const float e = __expf(v - s.max);
      if constexpr (PLAIN) return row.weight == 0 ? 0.0f : j == label_here ? (row.factor * e - 1.0f) * row.scale : factor * e;
      else return row.gradient(row.factor * e, v, first + j);
    };
#pragma unroll 2
    for (int j = threadIdx.x * 4; j < whole; j += THREADS * 4) {
      const float4 v = *reinterpret_cast<const float4*>(row_piece + j);
      *reinterpret_cast<uint2*>(d + j) = make_uint2(pack(gradient(v.x, j), gradient(v.y, j + 1)), pack(gradient(v.z, j + 2), gradient(v.w, j + 3)));
      if (next) fetch(row_piece + j, next + j);
    }
    if (rest < n) d[rest] = __float2bfloat16(gradient(last, rest));
  }
  // No block may leave while others read its sums.
  cluster_arrive();
  cluster_wait();
}

/* Columns a block takes so that `blocks` of them hold a row. */
int64_t piece_of(int64_t vocab, int blocks) { return ((vocab + blocks - 1) / blocks + 7) / 8 * 8; }

/* How many clusters the current device runs at once; 0: none, or this build has no code for them. Asked once per device and shape. */
int clusters_at_once(const void* kernel, cudaLaunchConfig_t config) {
  static std::mutex mutex;
  static auto* known = new std::map<std::tuple<int, const void*, unsigned, size_t>, int>();
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 9) return 0;
  std::lock_guard<std::mutex> lock(mutex);
  const auto [at, fresh] = known->try_emplace({device, kernel, config.attrs->val.clusterDim.x, config.dynamicSmemBytes}, 0);
  if (!fresh) return at->second;
  cudaFuncAttributes attributes{};
  config.gridDim = dim3(config.attrs->val.clusterDim.x);
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess || attributes.ptxVersion < 90 ||
      lctx::cuda::allow_shared_memory(kernel, kMaxPiece * sizeof(float)) != cudaSuccess || cudaOccupancyMaxActiveClusters(&at->second, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    at->second = 0;
  }
  return at->second;
}

template <bool PLAIN>
bool launch(const Rows& p, int blocks, cudaStream_t stream, int* status) {
  const int64_t piece = piece_of(p.vocab, blocks);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = static_cast<size_t>(piece) * sizeof(float);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const int most = clusters_at_once(reinterpret_cast<const void*>(one_read_kernel<PLAIN>), config);
  if (most < 1) return false;
  config.gridDim = dim3(static_cast<unsigned>(blocks * (p.rows < most ? p.rows : most)));
  *status = cudaLaunchKernelEx(&config, one_read_kernel<PLAIN>, p, blocks, static_cast<int>(piece));
  return true;
}

}  // namespace

bool one_read(const Rows& p, cudaStream_t stream, int* status) {
  int blocks = 1;
  while (blocks <= 8 && piece_of(p.vocab, blocks) > kMaxPiece) blocks *= 2;
  if (blocks > 8 || !starts_on_16_bytes(p) || kMaxPiece * static_cast<int64_t>(sizeof(float)) > lctx::cuda::shared_memory_limit()) return false;
  return is_plain(p) ? launch<true>(p, blocks, stream, status) : launch<false>(p, blocks, stream, status);
}

}  // namespace lctx::chunked_ce::cuda
