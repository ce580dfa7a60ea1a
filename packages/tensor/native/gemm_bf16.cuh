/* bf16 GEMM with f32 accumulation on tensor cores: mma.sync m16n8k16, operands through a ring of swizzled shared-memory tiles filled by cp.async.
 * Runs from sm_80 on and takes at most 96 KiB of shared memory. One kernel serves plain and grouped products: a group only changes where a tile starts.
 *
 * Each warp owns 64 x 64 of c: the largest square whose accumulators fit in registers, so shared memory is read least per multiply. Fragments of the next 16 k
 * are loaded while those of the present 16 are multiplied, across stages too. Every element sums its k in the same order in every configuration: an
 * element's bits depend on its row of op(a), its column of op(b) and k alone. */
#ifndef LCTX_GEMM_BF16_CUH
#define LCTX_GEMM_BF16_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "gemm_tiles.cuh"
#include "lctx/shared_memory.h"

namespace lctx::cuda {

/* BM x BN of c per block, k in steps of BK, STAGES tiles in flight, at least CTAS blocks on a multiprocessor. */
template <int BM_, int BN_, int BK_, int STAGES_, int CTAS_>
struct GemmTile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_, CTAS = CTAS_;
  static constexpr int WARPS_N = BN / 64, THREADS = BM / 64 * WARPS_N * 32;
  static constexpr int STAGE_BYTES = (BM + BN) * BK * 2, SMEM = STAGES * STAGE_BYTES;
};
using GemmLarge = GemmTile<256, 128, 32, 4, 1>; /* 96 KiB; with steps of 64 k, and twice the memory, it is 10% slower */
using GemmSmall = GemmTile<128, 128, 32, 4, 2>; /* 64 KiB */

namespace gemm_detail {

__device__ __forceinline__ uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void cp_async(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(bytes));
}
template <bool TRANS>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* One operand: R rows (m or n) by BK of k per tile. K_CONTIGUOUS: stored, and kept in shared memory, as R rows of BK; else as BK rows of R. Chunks of 8
 * elements are permuted within lines of 128 bytes, so that neither ldmatrix nor cp.async meets bank conflicts. */
template <int R, int BK, int THREADS, bool K_CONTIGUOUS, bool ALIGNED>
struct Operand {
  static constexpr int PER_ROW = (K_CONTIGUOUS ? BK : R) / 8;   // chunks in a row of shared memory
  static constexpr int ROWS = THREADS / PER_ROW;                // rows that one pass of all threads fills
  static constexpr int PASSES = (K_CONTIGUOUS ? R : BK) / ROWS;
  static_assert(ROWS % 8 == 0 && PASSES >= 1, "the permutation must be the same in every pass");

  const __nv_bfloat16* at; /* this thread's chunk of pass 0 */
  int64_t ld;
  uint32_t rows_valid; /* K_CONTIGUOUS: bit per pass */
  int columns_valid;   /* else: elements of the chunk that exist */
  int k_at;            /* k of the chunk within a tile, in pass 0 */
  uint32_t to;         /* byte offset in the tile */

  static __device__ __forceinline__ uint32_t permuted(int row, int chunk) {
    const int key = K_CONTIGUOUS && BK == 32 ? (row >> 1) & 3 : row & 7;  // rows of 64 bytes: two to a line
    return static_cast<uint32_t>(row * PER_ROW + (chunk ^ key)) * 16;
  }

  /* r0: first row of the tile, `rows`: how many there are. */
  __device__ __forceinline__ void start(const __nv_bfloat16* source, int64_t ld_, int64_t r0, int64_t rows) {
    const int row = threadIdx.x / PER_ROW, chunk = threadIdx.x % PER_ROW;
    ld = ld_;
    to = permuted(row, chunk);
    if constexpr (K_CONTIGUOUS) {
      at = source + (r0 + row) * ld + chunk * 8;
      k_at = chunk * 8;
      rows_valid = 0;
      for (int i = 0; i < PASSES; i++) rows_valid |= (r0 + row + i * ROWS < rows ? 1u : 0u) << i;
    } else {
      at = source + row * ld + r0 + chunk * 8;
      k_at = row;
      const int64_t left = rows - r0 - chunk * 8;
      columns_valid = static_cast<int>(left < 0 ? 0 : left > 8 ? 8 : left);
    }
  }

  /* Fills a tile with the next BK of k, of which `k_left` exist; what does not exist is zero. */
  __device__ __forceinline__ void load(uint32_t tile, int k_left) {
    const __nv_bfloat16* source = at;
    const int k_valid = min(max(k_left - k_at, 0), 8);
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      int valid;
      if constexpr (K_CONTIGUOUS) valid = (rows_valid >> i) & 1 ? k_valid : 0;
      else valid = k_at + i * ROWS < k_left ? columns_valid : 0;
      const uint32_t dst = tile + to + i * ROWS * PER_ROW * 16;
      if constexpr (ALIGNED) {
        cp_async(dst, source, valid * 2);
      } else {
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint32_t low = 2 * j < valid ? reinterpret_cast<const uint16_t*>(source)[2 * j] : 0u;
          const uint32_t high = 2 * j + 1 < valid ? reinterpret_cast<const uint16_t*>(source)[2 * j + 1] : 0u;
          v[j] = low | high << 16;
        }
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(dst), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
      }
      source += ROWS * ld;
    }
    at += K_CONTIGUOUS ? static_cast<int64_t>(BK) : BK * ld;
  }

  /* Where this lane's ldmatrix address of the 16 x 16 at (first row of the warp + 16 i, 16 kk) lies in a tile. `n_first`: the order of b's fragments. */
  static __device__ __forceinline__ uint32_t fragment_base(int warp_row, bool n_first) {
    const int lane = threadIdx.x % 32;
    // a: (m 0-7, k 0-7), (m 8-15, k 0-7), (m 0-7, k 8-15), (m 8-15, k 8-15). b: (n 0-7, k 0-7), (n 0-7, k 8-15), (n 8-15, k 0-7), (n 8-15, k 8-15).
    const int r = n_first ? (lane & 7) + (lane >> 4) * 8 : lane & 15;
    const int k8 = n_first ? (lane >> 3) & 1 : lane >> 4;
    if constexpr (K_CONTIGUOUS) return permuted(warp_row + r, k8);
    else return permuted((lane & 7) + k8 * 8, warp_row / 8 + r / 8);
  }
  static __device__ __forceinline__ uint32_t fragment(uint32_t base, int i, int kk) {
    if constexpr (K_CONTIGUOUS) return (base ^ static_cast<uint32_t>(kk << 5)) + i * 16 * PER_ROW * 16;
    else return (base ^ static_cast<uint32_t>(i << 5)) + kk * 16 * PER_ROW * 16;
  }
};

/* Four lanes hold two neighbouring columns of each of four 8-column blocks; afterwards lane l holds all eight columns of block l. */
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t s0 = __shfl_xor_sync(~0u, odd ? r[0] : r[1], 1), s1 = __shfl_xor_sync(~0u, odd ? r[2] : r[3], 1);
  (odd ? r[0] : r[1]) = s0;
  (odd ? r[2] : r[3]) = s1;
  const uint32_t t0 = __shfl_xor_sync(~0u, high ? r[0] : r[2], 2), t1 = __shfl_xor_sync(~0u, high ? r[1] : r[3], 2);
  (high ? r[0] : r[2]) = t0;
  (high ? r[1] : r[3]) = t1;
}

/* The warp's 64 x 64 of c. `vector`: c's rows and n are such that 16-byte (bf16) or 8-byte (f32) stores are aligned. */
__device__ __forceinline__ void store_warp(const float (&acc)[4][8][4], const GemmLaunch& p, void* c_base, int64_t row0, int64_t column0, int64_t m) {
  const int lane = threadIdx.x % 32;
  const bool vector = p.vector_c != 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = row0 + i * 16 + lane / 4 + h * 8;
      const bool row_valid = row < m;
      if (p.c_f32) {
        float* c = static_cast<float*>(c_base) + row * p.ldc;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const int64_t column = column0 + j * 8 + lane % 4 * 2;
          float v0 = p.alpha * acc[i][j][h * 2], v1 = p.alpha * acc[i][j][h * 2 + 1];
          if (!row_valid) continue;
          if (vector && column + 1 < p.n) {
            float2* at = reinterpret_cast<float2*>(c + column);
            if (p.beta != 0.0f) {
              const float2 before = *at;
              v0 += p.beta * before.x;
              v1 += p.beta * before.y;
            }
            *at = make_float2(v0, v1);
          } else {
            if (column < p.n) c[column] = p.beta != 0.0f ? v0 + p.beta * c[column] : v0;
            if (column + 1 < p.n) c[column + 1] = p.beta != 0.0f ? v1 + p.beta * c[column + 1] : v1;
          }
        }
      } else {
        __nv_bfloat16* c = static_cast<__nv_bfloat16*>(c_base) + row * p.ldc;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32_t packed[4];
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int64_t column = column0 + (half * 4 + j) * 8 + lane % 4 * 2;
            float v0 = p.alpha * acc[i][half * 4 + j][h * 2], v1 = p.alpha * acc[i][half * 4 + j][h * 2 + 1];
            if (p.beta != 0.0f && row_valid) {
              if (column < p.n) v0 += p.beta * __bfloat162float(c[column]);
              if (column + 1 < p.n) v1 += p.beta * __bfloat162float(c[column + 1]);
            }
            const __nv_bfloat162 pair = __floats2bfloat162_rn(v0, v1);
            packed[j] = *reinterpret_cast<const uint32_t*>(&pair);
          }
          transpose_quad(packed);  // every lane takes part
          const int64_t column = column0 + half * 32 + lane % 4 * 8;
          if (!row_valid || column >= p.n) continue;
          if (vector && column + 8 <= p.n) {
            *reinterpret_cast<uint4*>(c + column) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
          } else {
#pragma unroll
            for (int e = 0; e < 8; e++)
              if (column + e < p.n) reinterpret_cast<uint16_t*>(c)[column + e] = static_cast<uint16_t>(packed[e / 2] >> (e % 2 * 16));
          }
        }
      }
    }
}

/* Blocks stay: each takes every gridDim.x-th tile, and loads run ahead of products across tiles, so that only a kernel's first tile waits for memory. */
template <class T, bool TA, bool TB, bool ALIGNED>
__global__ void __launch_bounds__(T::THREADS, T::CTAS) gemm_kernel(const __grid_constant__ GemmLaunch p, uint32_t tiles) {
  extern __shared__ __align__(128) unsigned char smem[];
  using A = Operand<T::BM, T::BK, T::THREADS, !TA, ALIGNED>;
  using B = Operand<T::BN, T::BK, T::THREADS, TB, ALIGNED>;
  const uint32_t base = smem_address(smem);
  // The next tile from `index` on that has anything to do; `index` moves there.
  auto seek = [&](uint32_t& index, TileOf* tile) {
    for (; index < tiles; index += gridDim.x)
      if (find_tile<T::BM, T::BN>(p, index, tile)) return true;
    return false;
  };

  A a;
  B b;
  uint32_t load_index = blockIdx.x;
  int k_left = 0;  // of the tile that is being loaded, from its next step on
  bool loading;
  auto begin = [&] {
    TileOf tile;
    loading = seek(load_index, &tile);
    if (!loading) return;
    a.start(static_cast<const __nv_bfloat16*>(p.a) + tile.a, p.lda, tile.m * T::BM, tile.rows);
    b.start(static_cast<const __nv_bfloat16*>(p.b) + tile.b, p.ldb, tile.n * T::BN, p.n);
    k_left = static_cast<int>(tile.k);
  };
  auto load = [&](int stage) {
    if (loading) {
      const uint32_t to = base + stage * T::STAGE_BYTES;
      a.load(to, k_left);
      b.load(to + T::BM * T::BK * 2, k_left);
      k_left -= T::BK;
      if (k_left <= 0) {
        load_index += gridDim.x;
        begin();
      }
    }
    asm volatile("cp.async.commit_group;\n");
  };

  const int warp = threadIdx.x / 32;
  const int wm = warp / T::WARPS_N * 64, wn = warp % T::WARPS_N * 64;
  // (b's permutation XORs bits below its tile's offset, a multiple of 4 KiB.)
  const uint32_t fa = A::fragment_base(wm, false), fb = B::fragment_base(wn, true) + T::BM * T::BK * 2;
  uint32_t ra[2][4][4], rb[2][4][4];
  auto fragments = [&](int buffer, int stage, int kk) {
    const uint32_t from = base + stage * T::STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < 4; i++) ldmatrix<TA>(ra[buffer][i], from + A::fragment(fa, i, kk));
#pragma unroll
    for (int j = 0; j < 4; j++) ldmatrix<!TB>(rb[buffer][j], from + B::fragment(fb, j, kk));
  };

  begin();
#pragma unroll 1
  for (int s = 0; s < T::STAGES - 1; s++) load(s);
  asm volatile("cp.async.wait_group %0;\n" ::"n"(T::STAGES - 2));
  __syncthreads();
  fragments(0, 0, 0);

  int read = 0, write = T::STAGES - 1;
  constexpr int KK = T::BK / 16;
  TileOf tile;
  for (uint32_t index = blockIdx.x; seek(index, &tile); index += gridDim.x) {
    float acc[4][8][4] = {};
    int steps = max(1, static_cast<int>((tile.k + T::BK - 1) / T::BK));  // without any k: one step of zeros
#pragma unroll 1
    for (; steps > 0; steps--) {
#pragma unroll
      for (int kk = 0; kk < KK; kk++) {
        if (kk == KK - 1) {
          // The next stage is filled, and everyone has its last fragments of this one in registers: it may be refilled.
          asm volatile("cp.async.wait_group %0;\n" ::"n"(T::STAGES - 2));
          __syncthreads();
          read = read + 1 == T::STAGES ? 0 : read + 1;
        }
        fragments((kk + 1) & 1, read, (kk + 1) % KK);
        if (kk == 0) {
          load(write);
          write = write + 1 == T::STAGES ? 0 : write + 1;
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int at = j % 2 ? 3 - i : i;  // neighbouring products share a fragment
            mma(acc[at][j], ra[kk & 1][at], rb[kk & 1][j / 2][j % 2 * 2], rb[kk & 1][j / 2][j % 2 * 2 + 1]);
          }
      }
    }
    seek(index, &tile);  // again, rather than in registers meanwhile
    unsigned char* c = static_cast<unsigned char*>(p.c) + tile.c * (p.c_f32 ? 4 : 2);
    store_warp(acc, p, c, tile.m * T::BM + wm, tile.n * T::BN + wn, tile.rows);
  }
  asm volatile("cp.async.wait_all;\n");
}

}  // namespace gemm_detail

template <class T, bool TA, bool TB, bool ALIGNED>
int launch_gemm_tile(const GemmLaunch& p, cudaStream_t stream) {
  auto* kernel = gemm_detail::gemm_kernel<T, TA, TB, ALIGNED>;
  if (const int error = allow_shared_memory(reinterpret_cast<const void*>(kernel), T::SMEM)) return error;
  const uint32_t tiles = TileGrid<T::BM, T::BN>(p).count(p), most = multiprocessors() * T::CTAS;
  kernel<<<tiles < most ? tiles : most, T::THREADS, T::SMEM, stream>>>(p, tiles);
  return cudaGetLastError();
}

template <class T, bool ALIGNED>
int launch_gemm_layouts(const GemmLaunch& p, cudaStream_t s) {
  if (p.trans_a) return p.trans_b ? launch_gemm_tile<T, true, true, ALIGNED>(p, s) : launch_gemm_tile<T, true, false, ALIGNED>(p, s);
  return p.trans_b ? launch_gemm_tile<T, false, true, ALIGNED>(p, s) : launch_gemm_tile<T, false, false, ALIGNED>(p, s);
}

/* One per translation unit. */
int launch_gemm_bf16_large(const GemmLaunch& p, cudaStream_t stream);     /* 16-byte rows */
int launch_gemm_bf16_small(const GemmLaunch& p, cudaStream_t stream);     /* 16-byte rows */
int launch_gemm_bf16_unaligned(const GemmLaunch& p, cudaStream_t stream); /* any rows */

}  // namespace lctx::cuda
#endif
