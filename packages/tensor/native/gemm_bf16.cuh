/* bf16 GEMM with f32 accumulation on tensor cores: mma.sync m16n8k16, operands through a ring of swizzled shared-memory tiles filled by cp.async.
 * Runs from sm_80 on, in 65, 98, 146 or 194 KiB of shared memory. One kernel serves plain and grouped products: a group only changes where a tile starts.
 *
 * Each warp owns 64 x 64 of c: the largest square whose accumulators fit in registers, so shared memory is read least per multiply. Fragments of the next 16 k
 * are loaded while those of the present 16 are multiplied, across stages too. Every element sums its k in the same order in every configuration: an
 * element's bits depend on its row of op(a), its column of op(b) and k alone. */
#ifndef LCTX_GEMM_BF16_CUH
#define LCTX_GEMM_BF16_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "gemm_store.cuh"
#include "gemm_tiles.cuh"
#include "lctx/mbarrier.cuh"
#include "lctx/mma.cuh"
#include "lctx/shared_memory.h"

namespace lctx::cuda {

/* BM x BN of c per block, k in steps of BK, LEAST to MOST stages in flight (as many as shared memory holds), at least CTAS blocks on a multiprocessor. The copies of a stage follow after FIRST x 4 of
 * a step's products; tiles come in bands of BAND rows. */
template <int BM_, int BN_, int BK_, int LEAST_, int MOST_, int CTAS_, int FIRST_, int BAND_ = kGroupRows>
struct GemmTile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, MOST = MOST_, CTAS = CTAS_, FIRST = FIRST_, BAND = BAND_;
  static constexpr int WARPS_N = BN / 64, WARPS = BM / 64 * WARPS_N, THREADS = WARPS * 32;
  static constexpr int STAGE_BYTES = (BM + BN) * BK * 2;
  static constexpr int KEPT = 8; /* tiles that a warp may have to know: of every stage in flight and the one that it stores */
  static_assert(KEPT > MOST + 1);
  static constexpr int smem(int stages) { return stages * (STAGE_BYTES + 16) + WARPS * KEPT * 32; }
  static constexpr int SMEM = smem(LEAST_);
};
using GemmDeep = GemmTile<256, 128, 64, 3, 4, 1, 6, 1024>;  /* 146 or 194 KiB: 4% faster than */
using GemmLarge = GemmTile<256, 128, 32, 4, 4, 1, 5, 1024>; /* 98 KiB */
using GemmSmall = GemmTile<128, 128, 32, 4, 4, 2, 6>;       /* 65 KiB */
static_assert(GemmLarge::SMEM <= 99 << 10 && GemmSmall::SMEM <= 99 << 10);

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
  int exists;          /* K_CONTIGUOUS: passes whose row exists; else elements of the chunk that exist */
  int k_at;            /* k of the chunk within a tile, in pass 0 */
  uint32_t to;         /* byte offset in the tile */
  /* Of the tile that is being filled. */
  const char* source;
  int k_left;          /* from k_at on */
  int passes;          /* K_CONTIGUOUS: that have anything to copy */

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
      const int64_t left = rows - r0 - row;
      exists = static_cast<int>(left <= 0 ? 0 : left > PASSES * ROWS ? PASSES : (left + ROWS - 1) / ROWS);
    } else {
      const int64_t left = rows - r0 - chunk * 8;
      exists = static_cast<int>(left < 0 ? 0 : left > 8 ? 8 : left);
    }
  }

  /* The next tile to be filled has the next BK of k, of which `left` exist. What does not exist becomes zero. */
  __device__ __forceinline__ void begin(int left) {
    source = at;
    k_left = left - k_at;
    passes = k_left > 0 ? exists : 0;
  }
  /* Pass i of PASSES, in order. */
  __device__ __forceinline__ void pass(uint32_t tile, int i) {
    const uint32_t dst = tile + to + i * ROWS * PER_ROW * 16;
    if constexpr (COPIES == Copies::kExact) {
      const bool some = K_CONTIGUOUS ? i < passes : exists && i * ROWS < k_left;
      cp_async_if(dst, source, some);
    } else {
      int valid;
      if constexpr (K_CONTIGUOUS) valid = i < passes ? min(k_left, 8) : 0;
      else valid = i * ROWS < k_left ? exists : 0;
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

/* A tile of c as its warps need it: written when its first operands are asked for, kept until it is stored. */
struct KeptTile {
  int32_t m, n;    /* in tiles */
  int32_t steps;   /* of BK, at least 1: without any k, one of zeros; 0: there are no more tiles */
  int32_t unused;
  int64_t rows, c; /* as in TileOf */
};
static_assert(sizeof(KeptTile) == 32);

/* A place in the ring of stages, its mbarriers ("copies have arrived", and 8 bytes further "every warp has read it"), and in which of its phases they are. */
struct StageAt {
  uint32_t at, bar, parity;
  __device__ __forceinline__ void next(uint32_t base, uint32_t end, int bytes) {
    at += bytes;
    bar += 16;
    if (at == end) {
      at = base;
      bar = end;
      parity ^= 1;
    }
  }
};

/* Blocks stay: each takes every gridDim.x-th tile, and loads run ahead of products across tiles, so that only a kernel's first tile waits for memory. Warps do not wait for
 * each other, only for operands and for stages that everyone has read: they drift apart, and one multiplies while another on the same scheduler computes addresses or stores. */
template <class T, bool TA, bool TB, Copies COPIES>
__global__ void __launch_bounds__(T::THREADS, T::CTAS) gemm_kernel(const __grid_constant__ GemmLaunch p, uint32_t tiles, uint32_t stages) {
  extern __shared__ __align__(128) unsigned char smem[];
  using A = Operand<T::BM, T::BK, T::THREADS, !TA, COPIES>;
  using B = Operand<T::BN, T::BK, T::THREADS, TB, COPIES>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The stages, two mbarriers for each, and the tiles that each warp has to know.
  const uint32_t base = smem_address(smem), end = base + stages * T::STAGE_BYTES;
  KeptTile* const kept = reinterpret_cast<KeptTile*>(smem + stages * (T::STAGE_BYTES + 16)) + warp * T::KEPT;
  if (threadIdx.x < stages) {
    mbarrier_init(end + threadIdx.x * 16, T::THREADS);
    mbarrier_init(end + threadIdx.x * 16 + 8, T::WARPS);
  }
  __syncthreads();

  A a;
  B b;
  uint32_t load_index = blockIdx.x, load_count = 0;
  bool loading = true;
  int k_left = 0;  // of the tile of c whose operands are being copied; 0 or less after the last
  auto begin_tile = [&] {
    TileOf tile = {};
    loading = false;
    for (; load_index < tiles && !loading; load_index += gridDim.x) loading = find_tile<T::BM, T::BN, T::BAND>(p, load_index, &tile);
    k_left = 0;
    if (loading) {
      a.start(static_cast<const __nv_bfloat16*>(p.a) + tile.a, p.lda, tile.m * T::BM, tile.rows);
      b.start(static_cast<const __nv_bfloat16*>(p.b) + tile.b, p.ldb, tile.n * T::BN, p.n);
      k_left = static_cast<int>(tile.k);
    }
    if (lane == 0)
      kept[load_count % T::KEPT] = {static_cast<int32_t>(tile.m), static_cast<int32_t>(tile.n), loading ? max(1, (k_left + T::BK - 1) / T::BK) : 0, 0, tile.rows, tile.c};
    load_count++;
  };
  // A stage is filled in this order, whatever stands between: begin_stage, every group of copies, end_stage. In groups, because the compiler puts three idle loads in front
  // of each copy that does not follow another.
  constexpr int PASSES = A::PASSES + B::PASSES, GROUPS = 2;
  StageAt write = {base, end, 1};  // (a new mbarrier passes for one that everyone has arrived at)
  auto begin_stage = [&] {
    a.begin(k_left);
    b.begin(k_left);
  };
  auto copy = [&](int group) {
    if (group == 0) mbarrier_wait(write.bar + 8, write.parity);
#pragma unroll
    for (int i = 0; i < PASSES; i++)
      if (i * GROUPS / PASSES == group) {
        if (i < A::PASSES) a.pass(write.at, i);
        else b.pass(write.at + T::BM * T::BK * 2, i - A::PASSES);
      }
    if (group == GROUPS - 1) {
      if constexpr (COPIES == Copies::kElements) mbarrier_arrive(write.bar);
      else mbarrier_arrive_after_copies(write.bar);
    }
  };
  auto end_stage = [&] {
    write.next(base, end, T::STAGE_BYTES);
    k_left -= T::BK;
    if (k_left <= 0 && loading) begin_tile();
  };
  // Where nothing is left to do everything that does not exist is copied as zeros, from an address that is never read.
  a.start(static_cast<const __nv_bfloat16*>(p.a), 0, 0, 0);
  b.start(static_cast<const __nv_bfloat16*>(p.b), 0, 0, 0);

  const int wm = warp / T::WARPS_N * 64, wn = warp % T::WARPS_N * 64;
  // (Permutations XOR bits of addresses below those in which stages and tiles begin.)
  const uint32_t fa = A::fragment_base(wm, false), fb = B::fragment_base(wn, true) + T::BM * T::BK * 2;
  // Fragments: a's 64 x 16 for this 16 k and the next, b's in blocks of 16 columns, this and the next.
  constexpr int KK = T::BK / 16;
  uint32_t ra[2][4][4], rb[2][4];
  auto load_a = [&](uint32_t from, int kk, int i) { ldmatrix<TA>(ra[kk % 2][i], A::fragment(from + fa, i, kk % KK)); };
  auto load_b = [&](uint32_t from, int block) { ldmatrix<!TB>(rb[block % 2], B::fragment(from + fb, block % 4, block / 4 % KK)); };

  begin_tile();
#pragma unroll 1
  for (uint32_t stage = 1; stage < stages; stage++) {
    begin_stage();
#pragma unroll
    for (int group = 0; group < GROUPS; group++) copy(group);
    end_stage();
  }
  StageAt read = {base, end, 0};
  mbarrier_wait(read.bar, read.parity);
#pragma unroll
  for (int i = 0; i < 4; i++) load_a(read.at, 0, i);
  load_b(read.at, 0);

#pragma unroll 1
  for (uint32_t count = 0;; count++) {
    __syncwarp();
    const KeptTile& tile = kept[count % T::KEPT];
    int steps = tile.steps;
    if (steps == 0) break;
    float acc[4][8][4] = {};
#pragma unroll 1
    for (; steps > 0; steps--) {
      begin_stage();
      uint32_t read_bar = 0;
#pragma unroll
      for (int kk = 0; kk < KK; kk++) {
#pragma unroll
        for (int block = 0; block < 4; block++) {
          const int now = kk * 4 + block;
          if (now == KK * 4 - 1) {
            read_bar = read.bar;
            read.next(base, end, T::STAGE_BYTES);
            mbarrier_wait(read.bar, read.parity);
          }
          load_b(read.at, now + 1);
#pragma unroll
          for (int h = 0; h < 2; h++) {
            // The stage that was read last is refilled among the products before the wait for the next.
#pragma unroll
            for (int group = 0; group < GROUPS; group++)
              if (group * ((KK * 4 - 1) * 2 - T::FIRST) / GROUPS + T::FIRST == now * 2 + h) copy(group);
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int at = (h + kk) % 2 ? 3 - i : i;  // neighbouring products share a fragment
              mma(acc[at][block * 2 + h], ra[kk % 2][at], rb[now % 2][h * 2], rb[now % 2][h * 2 + 1]);
            }
            if (h == 0) {
              if (kk < KK - 1) load_a(read.at, kk + 1, block);
              else if (block == 3)
#pragma unroll
                for (int i = 0; i < 4; i++) load_a(read.at, kk + 1, i);
            }
          }
        }
      }
      // All of the warp's fragments of that stage have been used.
      __syncwarp();
      if (lane == 0) mbarrier_arrive(read_bar + 8);
      end_stage();
    }
    unsigned char* c = static_cast<unsigned char*>(p.c) + tile.c * (p.c_f32 ? 4 : 2);
    store_warp(acc, p, c, static_cast<int64_t>(tile.m) * T::BM + wm, static_cast<int64_t>(tile.n) * T::BN + wn, tile.rows);
  }
  cp_async_commit();
  cp_async_wait<0>();
}

}  // namespace gemm_detail

template <class T, bool TA, bool TB, gemm_detail::Copies COPIES>
int launch_gemm_tile(const GemmLaunch& p, cudaStream_t stream) {
  auto* kernel = gemm_detail::gemm_kernel<T, TA, TB, COPIES>;
  const int64_t limit = shared_memory_limit();
  int stages = T::MOST;
  while (T::smem(stages) > limit && T::smem(stages) > T::SMEM) stages--;
  if (const int error = allow_shared_memory(reinterpret_cast<const void*>(kernel), T::smem(stages))) return error;
  const uint32_t tiles = TileGrid<T::BM, T::BN>(p).count(p), most = multiprocessors() * T::CTAS;
  kernel<<<tiles < most ? tiles : most, T::THREADS, T::smem(stages), stream>>>(p, tiles, stages);
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
int launch_gemm_bf16_chunks(const GemmLaunch& p, cudaStream_t stream);   /* 16-byte rows */
int launch_gemm_bf16_elements(const GemmLaunch& p, cudaStream_t stream); /* any rows */

}  // namespace lctx::cuda
#endif
