/* bf16 GEMM with f32 accumulation on tensor cores: mma.sync m16n8k16, operands through a ring of swizzled shared-memory tiles filled by cp.async.
 * Runs from sm_80 on, in 64, 96 or 144 KiB of shared memory. One kernel serves plain and grouped products: a group only changes where a tile starts.
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
#include "lctx/mma.cuh"
#include "lctx/shared_memory.h"

namespace lctx::cuda {

/* BM x BN of c per block, k in steps of BK, STAGES tiles in flight, at least CTAS blocks on a multiprocessor. The first copy of a stage follows after FIRST x 4 of a step's products; tiles come in bands of
 * BAND rows. */
template <int BM_, int BN_, int BK_, int STAGES_, int CTAS_, int FIRST_ = 2, int BAND_ = kGroupRows>
struct GemmTile {
  static constexpr int FIRST = FIRST_, BAND = BAND_;
  static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_, CTAS = CTAS_;
  static constexpr int WARPS_N = BN / 64, THREADS = BM / 64 * WARPS_N * 32;
  static constexpr int STAGE_BYTES = (BM + BN) * BK * 2, SMEM = STAGES * STAGE_BYTES;
};
using GemmDeep = GemmTile<256, 128, 64, 3, 1, 8, 1024>; /* 144 KiB: 5 to 8% faster than */
using GemmLarge = GemmTile<256, 128, 32, 4, 1>;          /* 96 KiB */
using GemmSmall = GemmTile<128, 128, 32, 4, 2>;          /* 64 KiB */

namespace gemm_detail {

using namespace lctx::warp;

/* How operands are copied. kExact: each chunk of 8 elements exists or does not, so that nothing branches and a copy is one instruction, which the compiler puts between
 * products (with whatever else a partial chunk takes, a third of a step's time went by without products). kChunks: some chunks exist in part. kElements: rows do not even start on
 * 16 bytes. */
enum class Copies { kExact, kChunks, kElements };

/* One operand: R rows (m or n) by BK of k per tile. K_CONTIGUOUS: stored, and kept in shared memory, as R rows of BK; else as BK rows of R. Chunks of 8
 * elements are permuted within lines of 128 bytes, so that neither ldmatrix nor cp.async meets bank conflicts. */
template <int R, int BK, int THREADS, bool K_CONTIGUOUS, Copies COPIES>
struct Operand {
  static constexpr int PER_ROW = (K_CONTIGUOUS ? BK : R) / 8;   // chunks in a row of shared memory
  static constexpr int ROWS = THREADS / PER_ROW;                // rows that one pass of all threads fills
  static constexpr int PASSES = (K_CONTIGUOUS ? R : BK) / ROWS;
  static_assert(ROWS % 8 == 0 && PASSES >= 1, "the permutation must be the same in every pass");

  const char* at;      /* this thread's chunk of pass 0 */
  int64_t step;        /* bytes from pass to pass */
  uint32_t exists;     /* K_CONTIGUOUS: bit per pass; else elements of the chunk that exist */
  int k_at;            /* k of the chunk within a tile, in pass 0 */
  uint32_t to;         /* byte offset in the tile */
  /* Of the tile that is being filled. */
  const char* source;
  int k_left;          /* from k_at on */

  static __device__ __forceinline__ uint32_t permuted(int row, int chunk) {
    const int key = K_CONTIGUOUS && BK == 32 ? (row >> 1) & 3 : row & 7;  // rows of 64 bytes: two to a line
    return static_cast<uint32_t>(row * PER_ROW + (chunk ^ key)) * 16;
  }

  /* r0: first row of the tile, `rows`: how many there are. */
  __device__ __forceinline__ void start(const __nv_bfloat16* from, int64_t ld, int64_t r0, int64_t rows) {
    const int row = threadIdx.x / PER_ROW, chunk = threadIdx.x % PER_ROW;
    to = permuted(row, chunk);
    step = ROWS * ld * 2;
    k_at = K_CONTIGUOUS ? chunk * 8 : row;
    at = reinterpret_cast<const char*>(K_CONTIGUOUS ? from + (r0 + row) * ld + chunk * 8 : from + row * ld + r0 + chunk * 8);
    if constexpr (K_CONTIGUOUS) {
      exists = 0;
      for (int i = 0; i < PASSES; i++) exists |= (r0 + row + i * ROWS < rows ? 1u : 0u) << i;
    } else {
      const int64_t left = rows - r0 - chunk * 8;
      exists = static_cast<uint32_t>(left < 0 ? 0 : left > 8 ? 8 : left);
    }
  }

  /* The next tile to be filled has the next BK of k, of which `left` exist. What does not exist becomes zero. */
  __device__ __forceinline__ void begin(int left) {
    source = at;
    k_left = left - k_at;
  }
  /* Pass i of PASSES, in order. */
  __device__ __forceinline__ void pass(uint32_t tile, int i) {
    const uint32_t dst = tile + to + i * ROWS * PER_ROW * 16;
    if constexpr (COPIES == Copies::kExact) {
      const bool some = K_CONTIGUOUS ? k_left > 0 && exists >> i & 1 : exists && i * ROWS < k_left;
      cp_async_if(dst, source, some);
    } else {
      int valid;
      if constexpr (K_CONTIGUOUS) valid = exists >> i & 1 ? min(max(k_left, 0), 8) : 0;
      else valid = i * ROWS < k_left ? static_cast<int>(exists) : 0;
      if constexpr (COPIES == Copies::kChunks) {
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
    }
    source += step;
    if (i == PASSES - 1) at = K_CONTIGUOUS ? at + BK * 2 : source;
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
            packed[j] = pack(v0, v1);
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
template <class T, bool TA, bool TB, Copies COPIES>
__global__ void __launch_bounds__(T::THREADS, T::CTAS) gemm_kernel(const __grid_constant__ GemmLaunch p, uint32_t tiles) {
  extern __shared__ __align__(128) unsigned char smem[];
  using A = Operand<T::BM, T::BK, T::THREADS, !TA, COPIES>;
  using B = Operand<T::BN, T::BK, T::THREADS, TB, COPIES>;
  const uint32_t base = smem_address(smem);
  // The next tile from `index` on that has anything to do; `index` moves there.
  auto seek = [&](uint32_t& index, TileOf* tile) {
    for (; index < tiles; index += gridDim.x)
      if (find_tile<T::BM, T::BN, T::BAND>(p, index, tile)) return true;
    return false;
  };

  A a;
  B b;
  uint32_t load_index = blockIdx.x;
  int k_left = 0;  // of the tile of c whose operands are being copied; 0 after the last
  auto begin_tile = [&] {
    TileOf tile;
    k_left = 0;
    if (!seek(load_index, &tile)) return;
    a.start(static_cast<const __nv_bfloat16*>(p.a) + tile.a, p.lda, tile.m * T::BM, tile.rows);
    b.start(static_cast<const __nv_bfloat16*>(p.b) + tile.b, p.ldb, tile.n * T::BN, p.n);
    k_left = static_cast<int>(tile.k);
  };
  // A stage is filled in this order, whatever stands between: begin_stage, every pass, end_stage.
  constexpr int PASSES = A::PASSES + B::PASSES;
  auto begin_stage = [&] {
    a.begin(k_left);
    b.begin(k_left);
  };
  auto pass = [&](uint32_t to, int i) {
    if (i < A::PASSES) a.pass(to, i);
    else b.pass(to + T::BM * T::BK * 2, i - A::PASSES);
    if (i == PASSES - 1) cp_async_commit();
  };
  auto end_stage = [&] {
    k_left -= T::BK;
    if (k_left <= 0 && load_index < tiles) {
      load_index += gridDim.x;
      begin_tile();
    }
  };
  // Where nothing is left to do everything that does not exist is copied as zeros, from an address that is never read.
  a.start(static_cast<const __nv_bfloat16*>(p.a), 0, 0, 0);
  b.start(static_cast<const __nv_bfloat16*>(p.b), 0, 0, 0);

  const int warp = threadIdx.x / 32;
  const int wm = warp / T::WARPS_N * 64, wn = warp % T::WARPS_N * 64;
  // (Permutations XOR bits of addresses below those in which stages and tiles begin.)
  const uint32_t fa = A::fragment_base(wm, false), fb = B::fragment_base(wn, true) + T::BM * T::BK * 2;
  uint32_t ra[2][4][4], rb[2][4][4];
  auto fragments = [&](int buffer, uint32_t from, int kk) {
#pragma unroll
    for (int i = 0; i < 4; i++) ldmatrix<TA>(ra[buffer][i], A::fragment(from + fa, i, kk));
#pragma unroll
    for (int j = 0; j < 4; j++) ldmatrix<!TB>(rb[buffer][j], B::fragment(from + fb, j, kk));
  };
  const uint32_t last = base + (T::STAGES - 1) * T::STAGE_BYTES;
  auto next = [&](uint32_t stage) { return stage == last ? base : stage + T::STAGE_BYTES; };

  begin_tile();
#pragma unroll 1
  for (uint32_t stage = base; stage != last; stage += T::STAGE_BYTES) {
    begin_stage();
#pragma unroll
    for (int i = 0; i < PASSES; i++) pass(stage, i);
    end_stage();
  }
  cp_async_wait<T::STAGES - 2>();
  __syncthreads();
  fragments(0, base, 0);

  uint32_t read = base, write = last;
  constexpr int KK = T::BK / 16;
  TileOf tile;
  for (uint32_t index = blockIdx.x; seek(index, &tile); index += gridDim.x) {
    float acc[4][8][4] = {};
    int steps = max(1, static_cast<int>((tile.k + T::BK - 1) / T::BK));  // without any k: one step of zeros
#pragma unroll 1
    for (; steps > 0; steps--) {
      begin_stage();
#pragma unroll
      for (int kk = 0; kk < KK; kk++) {
        if (kk == KK - 1) {
          // The next stage is filled, and everyone has its last fragments of this one in registers: it may be refilled.
          cp_async_wait<T::STAGES - 2>();
          __syncthreads();
          read = next(read);
        }
        fragments((kk + 1) & 1, read, (kk + 1) % KK);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          // The stage that was read last is refilled, evenly among the products before the barrier.
#pragma unroll
          for (int i = 0; i < PASSES; i++)
            if (i * ((KK - 1) * 8 - T::FIRST) / PASSES + T::FIRST == kk * 8 + j) pass(write, i);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int at = j % 2 ? 3 - i : i;  // neighbouring products share a fragment
            mma(acc[at][j], ra[kk & 1][at], rb[kk & 1][j / 2][j % 2 * 2], rb[kk & 1][j / 2][j % 2 * 2 + 1]);
          }
        }
      }
      write = next(write);
      end_stage();
    }
    seek(index, &tile);  // again, rather than in registers meanwhile
    unsigned char* c = static_cast<unsigned char*>(p.c) + tile.c * (p.c_f32 ? 4 : 2);
    store_warp(acc, p, c, tile.m * T::BM + wm, tile.n * T::BN + wn, tile.rows);
  }
  cp_async_wait<0>();
}

}  // namespace gemm_detail

template <class T, bool TA, bool TB, gemm_detail::Copies COPIES>
int launch_gemm_tile(const GemmLaunch& p, cudaStream_t stream) {
  auto* kernel = gemm_detail::gemm_kernel<T, TA, TB, COPIES>;
  if (const int error = allow_shared_memory(reinterpret_cast<const void*>(kernel), T::SMEM)) return error;
  const uint32_t tiles = TileGrid<T::BM, T::BN>(p).count(p), most = multiprocessors() * T::CTAS;
  kernel<<<tiles < most ? tiles : most, T::THREADS, T::SMEM, stream>>>(p, tiles);
  return cudaGetLastError();
}

template <class T, gemm_detail::Copies COPIES>
int launch_gemm_layouts(const GemmLaunch& p, cudaStream_t s) {
  if (p.trans_a) return p.trans_b ? launch_gemm_tile<T, true, true, COPIES>(p, s) : launch_gemm_tile<T, true, false, COPIES>(p, s);
  return p.trans_b ? launch_gemm_tile<T, false, true, COPIES>(p, s) : launch_gemm_tile<T, false, false, COPIES>(p, s);
}

/* Whether every chunk of 8 elements along a row of an operand lies in it as a whole. (k of a grouped weight gradient counts rows.) */
inline bool gemm_chunks_exact(const GemmLaunch& p) { return (p.trans_a ? p.m : p.k) % 8 == 0 && (p.trans_b ? p.k : p.n) % 8 == 0; }

/* One per translation unit. */
int launch_gemm_bf16_deep(const GemmLaunch& p, cudaStream_t stream);     /* exact chunks */
int launch_gemm_bf16_large(const GemmLaunch& p, cudaStream_t stream);    /* exact chunks */
int launch_gemm_bf16_small(const GemmLaunch& p, cudaStream_t stream);    /* exact chunks */
int launch_gemm_bf16_chunks(const GemmLaunch& p, cudaStream_t stream);    /* 16-byte rows */
int launch_gemm_bf16_elements(const GemmLaunch& p, cudaStream_t stream); /* any rows */

}  // namespace lctx::cuda
#endif
