/* bf16 GEMM with f32 accumulation on tensor cores: mma.sync m16n8k16, operands through a ring of swizzled shared-memory tiles filled by cp.async.
 * Runs from sm_80 on and takes 96 KiB of shared memory. One kernel serves plain and grouped products: a group only changes where a tile starts.
 *
 * A tile of 128 x 128 of c per block of 8 warps (2 x 4), 64 x 32 per warp; k in steps of 64, three stages. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace lctx::cuda {
namespace {

constexpr int BM = 128, BN = 128, BK = 64, STAGES = 3, THREADS = 256;
constexpr int TILE = 128 * 64;  // elements of one operand's tile, either way round
constexpr int SMEM = STAGES * 2 * TILE * 2;

__device__ __forceinline__ uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void cp_async(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(bytes));
}
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* A tile in shared memory, in rows of `ROW` elements of which 8-element chunks are permuted, so that ldmatrix and cp.async meet no bank conflicts.
 * k-contiguous operands: 128 rows (m or n) of 64 (k). Others: 64 rows (k) of 128 (m or n). */
template <int ROW>
__device__ __forceinline__ int swizzled(int row, int column) { return row * ROW + (((column >> 3) ^ (row & 7)) << 3) + (column & 7); }

/* Loads rows [r0, r0 + R) x columns [c0, c0 + C) of src [rows, columns]; what lies outside is zero. */
template <bool K_CONTIGUOUS, bool ALIGNED>
__device__ __forceinline__ void load_tile(const __nv_bfloat16* __restrict__ src, int64_t ld, int64_t r0, int64_t c0, int64_t rows, int64_t columns,
                                          __nv_bfloat16* dst) {
  constexpr int C = K_CONTIGUOUS ? BK : 128;
  constexpr int CHUNKS = C / 8;
#pragma unroll
  for (int i = 0; i < TILE / 8 / THREADS; i++) {
    const int chunk = i * THREADS + threadIdx.x, row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
    const int64_t r = r0 + row, c = c0 + column;
    int64_t valid = r < rows ? columns - c : 0;
    valid = valid < 0 ? 0 : (valid > 8 ? 8 : valid);
    __nv_bfloat16* at = dst + swizzled<C>(row, column);
    if (ALIGNED) {
      cp_async(smem_address(at), valid > 0 ? src + r * ld + c : src, static_cast<int>(valid) * 2);
    } else {
      __nv_bfloat16 v[8];
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = j < valid ? src[r * ld + c + j] : __float2bfloat16(0.0f);
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(v);
    }
  }
}

template <bool TA, bool TB, bool ALIGNED, typename C>
__global__ void __launch_bounds__(THREADS) gemm_kernel(GemmLaunch p) {
  extern __shared__ __align__(128) __nv_bfloat16 smem[];
  const auto* a = static_cast<const __nv_bfloat16*>(p.a);
  const auto* b = static_cast<const __nv_bfloat16*>(p.b);
  C* c = static_cast<C*>(p.c);
  int64_t m = p.m, k = p.k;
  int64_t tile_m, tile_n;
  const int64_t tiles_n = (p.n + BN - 1) / BN;

  if (p.offsets == nullptr) {
    // Blocks in groups of 8 row tiles: neighbours share operands in L2.
    const int64_t tiles_m = (m + BM - 1) / BM, per_group = 8 * tiles_n, group = blockIdx.x / per_group;
    const int64_t first = group * 8, size = tiles_m - first < 8 ? tiles_m - first : 8, in_group = blockIdx.x % per_group;
    tile_m = first + in_group % size;
    tile_n = in_group / size;
  } else if (p.mode == 0) {
    // The block's row tile, counted over the experts' own tiles.
    int64_t left = blockIdx.y;
    int expert = 0;
    int32_t start = 0, end = 0;
    for (; expert < p.experts; expert++) {
      start = p.offsets[expert];
      end = p.offsets[expert + 1];
      const int64_t tiles = (end - start + BM - 1) / BM;
      if (left < tiles) break;
      left -= tiles;
    }
    if (expert == p.experts) return;
    tile_m = left;
    tile_n = blockIdx.x;
    m = end - start;
    a += static_cast<int64_t>(start) * p.lda;
    c += static_cast<int64_t>(start) * p.ldc;
    b += expert * p.stride_b;
  } else {
    const int expert = blockIdx.z;
    const int32_t start = p.offsets[expert];
    k = p.offsets[expert + 1] - start;
    tile_m = blockIdx.y;
    tile_n = blockIdx.x;
    a += static_cast<int64_t>(start) * p.lda;  // stored [k, m]
    b += static_cast<int64_t>(start) * p.ldb;  // stored [k, n]
    c += expert * p.stride_c;
  }

  const int64_t m0 = tile_m * BM, n0 = tile_n * BN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int wm = warp / 4 * 64, wn = warp % 4 * 32;
  const int steps = static_cast<int>((k + BK - 1) / BK);
  auto stage = [&](int s) { return smem + s * 2 * TILE; };
  auto load = [&](int step) {
    __nv_bfloat16* to = stage(step % STAGES);
    const int64_t k0 = static_cast<int64_t>(step) * BK;
    if (TA) load_tile<false, ALIGNED>(a, p.lda, k0, m0, k, m, to);
    else load_tile<true, ALIGNED>(a, p.lda, m0, k0, m, k, to);
    if (TB) load_tile<true, ALIGNED>(b, p.ldb, n0, k0, p.n, k, to + TILE);
    else load_tile<false, ALIGNED>(b, p.ldb, k0, n0, k, p.n, to + TILE);
  };

  float acc[4][4][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load(s);
    asm volatile("cp.async.commit_group;\n");
  }
  for (int step = 0; step < steps; step++) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(STAGES - 2));
    __syncthreads();  // this stage is filled for everyone, and everyone is done with the one that is refilled next
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    asm volatile("cp.async.commit_group;\n");
    const __nv_bfloat16* ta = stage(step % STAGES);
    const __nv_bfloat16* tb = ta + TILE;
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
      uint32_t fa[4][4], fb[2][4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = wm + i * 16;
        // Matrices in the order (m 0-7, k 0-7), (m 8-15, k 0-7), (m 0-7, k 8-15), (m 8-15, k 8-15).
        if (TA) ldmatrix_trans(fa[i], smem_address(ta + swizzled<128>(kk + (lane & 7) + (lane >> 4) * 8, row + ((lane >> 3) & 1) * 8)));
        else ldmatrix(fa[i], smem_address(ta + swizzled<BK>(row + (lane & 15), kk + (lane >> 4) * 8)));
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = wn + j * 16;
        // (n 0-7, k 0-7), (n 0-7, k 8-15), (n 8-15, k 0-7), (n 8-15, k 8-15)
        if (TB) ldmatrix(fb[j], smem_address(tb + swizzled<BK>(column + (lane & 7) + (lane >> 4) * 8, kk + ((lane >> 3) & 1) * 8)));
        else ldmatrix_trans(fb[j], smem_address(tb + swizzled<128>(kk + (lane & 15), column + (lane >> 4) * 8)));
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
    }
  }

#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t row = m0 + wm + i * 16 + lane / 4 + h * 8, column = n0 + wn + j * 8 + lane % 4 * 2;
        if (row >= m) continue;
        C* at = c + row * p.ldc + column;
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (column + e >= p.n) continue;
          float v = p.alpha * acc[i][j][h * 2 + e];
          if (p.beta != 0.0f) v += p.beta * static_cast<float>(at[e]);
          at[e] = static_cast<C>(v);
        }
      }
}

template <bool TA, bool TB, bool ALIGNED, typename C>
int launch(const GemmLaunch& p, cudaStream_t stream) {
  auto* kernel = gemm_kernel<TA, TB, ALIGNED, C>;
  static const cudaError_t attribute = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM);
  if (attribute != cudaSuccess) return attribute;
  const auto tiles = [](int64_t n, int64_t t) { return static_cast<unsigned>((n + t - 1) / t); };
  dim3 grid;
  if (p.offsets == nullptr) grid = dim3(tiles(p.m, BM) * tiles(p.n, BN));
  else if (p.mode == 0) grid = dim3(tiles(p.n, BN), tiles(p.m, BM) + p.experts);  // at most one partial tile per expert
  else grid = dim3(tiles(p.n, BN), tiles(p.m, BM), p.experts);
  kernel<<<grid, THREADS, SMEM, stream>>>(p);
  return cudaGetLastError();
}

template <bool ALIGNED, typename C>
int launch_layout(const GemmLaunch& p, cudaStream_t s) {
  if (p.trans_a) return p.trans_b ? launch<true, true, ALIGNED, C>(p, s) : launch<true, false, ALIGNED, C>(p, s);
  return p.trans_b ? launch<false, true, ALIGNED, C>(p, s) : launch<false, false, ALIGNED, C>(p, s);
}

}  // namespace

int launch_gemm_bf16(const GemmLaunch& p, void* stream) {
  if (p.m == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const auto aligned = [](const void* q, int64_t ld, int64_t stride) { return reinterpret_cast<uintptr_t>(q) % 16 == 0 && ld % 8 == 0 && stride % 8 == 0; };
  const bool fast = aligned(p.a, p.lda, 0) && aligned(p.b, p.ldb, p.stride_b);
  if (p.c_f32) return fast ? launch_layout<true, float>(p, s) : launch_layout<false, float>(p, s);
  return fast ? launch_layout<true, __nv_bfloat16>(p, s) : launch_layout<false, __nv_bfloat16>(p, s);
}

}  // namespace lctx::cuda
