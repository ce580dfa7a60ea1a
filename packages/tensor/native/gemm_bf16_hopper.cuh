/* bf16 GEMM with f32 accumulation on Hopper's warpgroup products: operands come by bulk tensor copies into a ring of swizzled tiles, one warp issues them, two warpgroups
 * multiply. Compute capability 9.0 alone (sm_90a), 225 KiB of shared memory. Plain and grouped products.
 *
 * A block's tile is 128 columns of c by up to 256 rows, and the product is taken transposed: columns of c are the 64 fixed rows of a warpgroup instruction, rows of c its N, which is
 * any multiple of 16. So an expert's rows are cut into tiles of about equal height, and next to none are wasted, however uneven the experts are; and each weight is read once for
 * up to 256 rows. Rows of the next expert that a copy of a tile's tail brings along are multiplied into columns of N that nobody stores.
 *
 * Every element sums its k in the same order in every configuration, 16 at a time: an element's bits depend on its row of op(a), its column of op(b) and k alone. */
#ifndef LCTX_GEMM_BF16_HOPPER_CUH
#define LCTX_GEMM_BF16_HOPPER_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "cuda_kernels.h"
#include "gemm_choice.h"
#include "gemm_tiles.cuh"
#include "lctx/hopper.cuh"
#include "lctx/shared_memory.h"

namespace lctx::cuda {

struct HopperGemm {
  static constexpr int COLUMNS = 128, ROWS = 256, STEP = 32, BK = 64, STAGES = 4; /* STEP: heights of tiles are multiples of it */
  static constexpr int BOX = 64 * BK * 2;                                         /* what one copy brings: 64 rows or columns of c by 64 of k */
  static constexpr int STAGE = (COLUMNS + ROWS) / 64 * BOX, STAGING = 128 * 64 * 2; /* STAGING: a warpgroup's 128 rows by 64 columns of c on their way out */
  static constexpr int THREADS = 384;
};

/* A tile of c, in the ring beside the operands of its first step. */
struct HopperTile {
  int64_t c; /* elements to its first row of c */
  int32_t row, rows, height, column, expert, k, steps; /* rows: that exist, of `height` that are multiplied; 0: no more tiles */
};

struct HopperLaunch {
  CUtensorMap columns, rows; /* op(b) and op(a) */
  GemmLaunch p;
  int32_t height;            /* of a tile; of grouped products, the most */
  int32_t across;            /* tiles across c, a multiple of the cluster */
  int32_t band;              /* tiles down c that run together */
};

struct HopperShared {
  uint64_t full[HopperGemm::STAGES], empty[HopperGemm::STAGES];
  HopperTile tile[HopperGemm::STAGES];
};
constexpr int kHopperGemmShared = 1024 + HopperGemm::STAGES * HopperGemm::STAGE + 2 * HopperGemm::STAGING + static_cast<int>(sizeof(HopperShared));

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace hopper_gemm {
using namespace lctx::hopper;
using G = HopperGemm;

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/* Tile `local` of `down` x `across`: as many tiles down as a band has run together, over all columns; they share operands in L2. */
struct At {
  uint32_t down, across;
};
__device__ __forceinline__ At within_band(uint32_t local, uint32_t down, uint32_t across, uint32_t band) {
  const uint32_t per_band = band * across, first = local / per_band * band, size = min(down - first, band), in = local % per_band;
  return {first + in % size, in / size};
}

/* Tile number `index`; all lanes of a warp call it. The blocks of a cluster have neighbouring columns of the same rows. */
template <int CLUSTER>
__device__ __forceinline__ bool find(const HopperLaunch& q, uint32_t index, HopperTile* t) {
  const GemmLaunch& p = q.p;
  const uint32_t across = static_cast<uint32_t>(q.across) / CLUSTER;
  const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
  if (p.offsets == nullptr) {
    const uint32_t height = static_cast<uint32_t>(q.height), down = static_cast<uint32_t>((p.m + height - 1) / height), per_product = across * down;
    const uint32_t product = index / per_product, local = index % per_product;
    if (product >= static_cast<uint32_t>(p.splits > 1 ? p.splits : 1)) return false;
    const At at = within_band(local, down, across, static_cast<uint32_t>(q.band));
    t->row = static_cast<int32_t>(at.down * height);
    t->column = static_cast<int32_t>((at.across * CLUSTER + rank) * G::COLUMNS);
    t->rows = static_cast<int32_t>(min(p.m - t->row, static_cast<int64_t>(height)));
    t->height = static_cast<int32_t>(height);
    t->expert = 0;
    const int64_t per = p.splits > 1 ? p.k_per_split : p.k, from = product * per;
    t->k = static_cast<int32_t>(from);
    t->steps = static_cast<int32_t>((min(p.k - from, per) + G::BK - 1) / G::BK);
    t->c = product * p.m * p.n + t->row * p.ldc;
    return true;
  }
  const int lane = threadIdx.x % 32;
  uint32_t left = index;
  for (int base = 0; base < p.experts; base += 32) {
    int64_t start = 0, end = 0;
    if (base + lane < p.experts) expert_rows(p, base + lane, p.m, &start, &end);
    const uint32_t down = static_cast<uint32_t>((end - start + G::ROWS - 1) / G::ROWS), tiles = down * across;
    uint32_t sum = tiles;  // of this lane's expert and those before it
    for (int o = 1; o < 32; o <<= 1) {
      const uint32_t below = __shfl_up_sync(~0u, sum, o);
      if (lane >= o) sum += below;
    }
    const unsigned found = __ballot_sync(~0u, left < sum);
    if (found) {
      const int at = __ffs(static_cast<int>(found)) - 1;
      const uint32_t local = left - __shfl_sync(~0u, sum - tiles, at), of = __shfl_sync(~0u, down, at);
      const int first = __shfl_sync(~0u, static_cast<int>(start), at), rows = __shfl_sync(~0u, static_cast<int>(end - start), at);
      // About equal heights; an expert's tiles of the same columns are next to each other, so that they share the weights in L2.
      const At tile = within_band(local, of, across, static_cast<uint32_t>(q.band));
      const int height = ((rows + static_cast<int>(of) - 1) / static_cast<int>(of) + G::STEP - 1) / G::STEP * G::STEP, from = static_cast<int>(tile.down) * height;
      t->row = first + from;
      t->rows = max(0, min(rows - from, height));
      t->height = t->rows > 0 ? (t->rows + G::STEP - 1) / G::STEP * G::STEP : 0;
      t->column = static_cast<int32_t>((tile.across * CLUSTER + rank) * G::COLUMNS);
      t->expert = base + at;
      t->k = 0;
      t->steps = static_cast<int32_t>((p.k + G::BK - 1) / G::BK);
      t->c = t->row * p.ldc;
      return true;
    }
    left -= __shfl_sync(~0u, sum, 31);
  }
  return false;
}

/* Of a value that is the same in all lanes, so that the compiler sees branches on it do not diverge. */
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == G::STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/* Lets a stage be filled again: in every block whose copies reach it. All lanes of the warp have read what they need of it. */
template <int CLUSTER>
__device__ __forceinline__ void release(uint32_t bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    if constexpr (CLUSTER == 1) {
      mbarrier_arrive(bar);
    } else {
#pragma unroll
      for (int i = 0; i < CLUSTER; i++)  // (with .release.cluster each would wait for all earlier writes)
        asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(i) : "memory");
    }
  }
}

__device__ __forceinline__ uint32_t pack(float a, float b) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ float2 unpack(uint32_t v) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v)); }

/* A warpgroup's 64 columns of c by N rows. Fragments are transposed by stmatrix into rows of 128 bytes, which leave whole; an earlier c comes in the same way, so that alpha and beta
 * meet in f32. `ready` is called before the first use of acc: what c holds is fetched while the last products run. */
template <int N, class Ready>
__device__ __forceinline__ void store(float (&acc)[N / 2], const GemmLaunch& p, const HopperTile& t, int group, uint32_t staging, Ready ready) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int64_t column0 = t.column + group * 64;
  if (p.c_f32) {
    ready();
    const int64_t column = column0 + warp * 16 + lane / 4;
    float* c = static_cast<float*>(p.c) + t.c + column;
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = j * 8 + lane % 4 * 2 + e % 2;
        float* to = c + row * p.ldc + e / 2 * 8;
        if (row < t.rows && column + e / 2 * 8 < p.n) *to = p.beta != 0.0f ? p.alpha * acc[j * 4 + e] + p.beta * *to : p.alpha * acc[j * 4 + e];
      }
    return;
  }
  const int chunk = thread % 8, row0 = thread / 8;
  const int64_t column = column0 + chunk * 8;
  const bool whole = p.vector_c && column + 8 <= p.n;
  const int left = static_cast<int>(min(static_cast<int64_t>(8), max(static_cast<int64_t>(0), p.n - column)));
  uint16_t* const c0 = static_cast<uint16_t*>(p.c) + t.c + row0 * p.ldc + column;
  if (p.beta != 0.0f && chunk == 0 && left > 0) {
#pragma unroll 1
    for (int row = row0; row < t.rows; row += 16) asm volatile("prefetch.global.L2 [%0];" ::"l"(c0 + (row - row0) * p.ldc));
  }
  ready();
#pragma unroll
  for (int half = 0; half < (N + 127) / 128; half++) {
    const int rows = N - half * 128 < 128 ? N - half * 128 : 128;
    uint16_t* c = c0 + half * 128 * p.ldc;
    const int exist = t.rows - half * 128 - row0;
    bar_sync(1 + group, 128);  // everyone has taken what lay here before
    if (p.beta != 0.0f) {
#pragma unroll
      for (int first = 0; first < rows / 16; first += 4) {  // four loads under way at once
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          v[i] = make_uint4(0, 0, 0, 0);
          if (first + i >= rows / 16 || (first + i) * 16 >= exist) continue;
          const uint16_t* from = c + (first + i) * 16 * p.ldc;
          if (whole) {
            v[i] = *reinterpret_cast<const uint4*>(from);
          } else {
            uint32_t parts[4] = {0, 0, 0, 0};
#pragma unroll
            for (int e = 0; e < 8; e++)
              if (e < left) parts[e / 2] |= static_cast<uint32_t>(from[e]) << (e % 2 * 16);
            v[i] = make_uint4(parts[0], parts[1], parts[2], parts[3]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = row0 + (first + i) * 16;
          if (first + i < rows / 16)
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(staging + row * 128 + ((chunk ^ (row & 7)) << 4)), "r"(v[i].x), "r"(v[i].y), "r"(v[i].z), "r"(v[i].w) : "memory");
        }
      }
      bar_sync(1 + group, 128);
    }
#pragma unroll
    for (int i = 0; i < rows / 16; i++) {
      const int row = i * 16 + (lane >> 4) * 8 + (lane & 7), at = warp * 2 + ((lane >> 3) & 1);
      const uint32_t address = staging + row * 128 + ((at ^ (row & 7)) << 4);
      const int v = half * 64 + i * 8;
      uint32_t r[4];
      if (p.beta != 0.0f) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#pragma unroll
        for (int h = 0; h < 4; h++) {
          const float2 old = unpack(r[h]);
          r[h] = pack(p.alpha * acc[v + h * 2] + p.beta * old.x, p.alpha * acc[v + h * 2 + 1] + p.beta * old.y);
        }
      } else {
#pragma unroll
        for (int h = 0; h < 4; h++) r[h] = pack(p.alpha * acc[v + h * 2], p.alpha * acc[v + h * 2 + 1]);
      }
      stmatrix_trans(address, r);
    }
    bar_sync(1 + group, 128);
#pragma unroll
    for (int i = 0; i < rows / 16; i++) {
      if (i * 16 >= exist || left == 0) break;
      const int row = row0 + i * 16;
      uint4 v;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(staging + row * 128 + ((chunk ^ (row & 7)) << 4)) : "memory");
      uint16_t* to = c + i * 16 * p.ldc;
      if (whole) {
        *reinterpret_cast<uint4*>(to) = v;
      } else {
        const uint32_t parts[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 8; e++)
          if (e < left) to[e] = static_cast<uint16_t>(parts[e / 2] >> (e % 2 * 16));
      }
    }
  }
}

/* One tile of N rows. TC, TR: 1 where the column's or the row's operand has k outermost. */
template <int N, int TC, int TR, int CLUSTER>
__device__ __forceinline__ void multiply(const GemmLaunch& p, const HopperTile& t, int group, uint32_t stages, uint32_t full, uint32_t empty, uint32_t staging, Ring& ring) {
  float acc[N / 2];
  const auto issue = [&](int first) {
    mbarrier_wait(full + ring.stage * 8, ring.parity);
    const uint32_t at = stages + ring.stage * G::STAGE;
    const uint64_t columns = descriptor(at + group * G::BOX), rows = descriptor(at + 2 * G::BOX, G::BOX);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) Wgmma<N>::template ss<TC, TR>(acc, columns + kk * (TC ? 128 : 2), rows + kk * (TR ? 128 : 2), first ? kk > 0 : 1);
    wgmma_commit();
  };
  issue(1);
  uint32_t before = empty + ring.stage * 8;
  ring.next();
#pragma unroll 1
  for (int step = 1; step < t.steps; step++) {
    issue(0);
    wgmma_wait<1>();  // the step before is done
    release<CLUSTER>(before);
    before = empty + ring.stage * 8;
    ring.next();
  }
  store<N>(acc, p, t, group, staging, [&] {
    wgmma_wait<0>();
    hold(acc);
    release<CLUSTER>(before);
  });
}

/* `rows` of a tile, in copies of 64; those of a cluster are shared out, and each goes to all blocks. */
template <int TC, int TR, int CLUSTER>
__device__ __forceinline__ void produce(const HopperLaunch& q, HopperShared* shared, uint32_t stages, uint32_t full, uint32_t empty) {
  const int lane = threadIdx.x % 32;
  const uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;
  Ring ring;
  HopperTile t;
  const uint32_t by = gridDim.x / CLUSTER;
  for (uint32_t index = blockIdx.x / CLUSTER; find<CLUSTER>(q, index, &t); index += by) {
    if (t.rows == 0) continue;
    const int boxes = (t.height + 63) / 64;
    for (int step = 0; step < t.steps; step++, ring.next()) {
      if (lane == 0) {
        mbarrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
        if (step == 0) shared->tile[ring.stage] = t;
        const uint32_t bar = full + ring.stage * 8, to = stages + ring.stage * G::STAGE;
        mbarrier_expect(bar, static_cast<uint32_t>((2 + boxes) * G::BOX));
        const int k = t.k + step * G::BK;
#pragma unroll
        for (int i = 0; i < 2; i++) tma_load(to + i * G::BOX, &q.columns, bar, TC ? t.column + i * 64 : k, TC ? k : t.column + i * 64, t.expert);
        for (int i = static_cast<int>(rank); i < boxes; i += CLUSTER) {
          const int x = TR ? t.row + i * 64 : k, y = TR ? k : t.row + i * 64;
          const uint32_t dst = to + (2 + i) * G::BOX;
          if constexpr (CLUSTER == 1)
            tma_load(dst, &q.rows, bar, x, y);
          else
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst), "l"(&q.rows), "r"(bar),
                         "r"(x), "r"(y), "h"(static_cast<uint16_t>((1 << CLUSTER) - 1))
                         : "memory");
        }
      }
      __syncwarp();
    }
  }
  if (lane == 0) {
    mbarrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
    shared->tile[ring.stage].rows = 0;
    mbarrier_arrive(full + ring.stage * 8);
  }
  __syncwarp();
}

template <int N, int TC, int TR, int CLUSTER>
__device__ __forceinline__ bool one_of(const GemmLaunch& p, const HopperTile& t, int group, uint32_t stages, uint32_t full, uint32_t empty, uint32_t staging, Ring& ring) {
  if (t.height != N) return false;
  multiply<N, TC, TR, CLUSTER>(p, t, group, stages, full, empty, staging, ring);
  return true;
}

}  // namespace hopper_gemm
#endif

template <int TC, int TR, int CLUSTER>
__global__ void __launch_bounds__(HopperGemm::THREADS, 1) gemm_hopper_kernel(const __grid_constant__ HopperLaunch q) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper_gemm;
  extern __shared__ __align__(1024) unsigned char raw[];
  const uint32_t stages = (smem(raw) + 1023) & ~1023u;
  const uint32_t staging = stages + G::STAGES * G::STAGE, tail = staging + 2 * G::STAGING;
  HopperShared* shared = reinterpret_cast<HopperShared*>(raw + (tail - smem(raw)));
  const uint32_t full = tail, empty = tail + G::STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < G::STAGES; i++) {
      mbarrier_init(full + i * 8, 1);
      mbarrier_init(empty + i * 8, 8 * CLUSTER);  // one per multiplying warp
    }
    mbarrier_init_fence();
  }
  if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  else __syncthreads();
  if (threadIdx.x >= 256) {
    registers_down<40>();
    if (threadIdx.x < 288) produce<TC, TR, CLUSTER>(q, shared, stages, full, empty);
  } else {
    registers_up<232>();
    const int group = uniform(threadIdx.x / 128);
    Ring ring;
    for (;;) {
      mbarrier_wait(full + ring.stage * 8, ring.parity);
      HopperTile t = shared->tile[ring.stage];
      t.rows = uniform(t.rows);
      t.height = uniform(t.height);
      t.steps = uniform(t.steps);
      if (t.rows == 0) break;
      const auto run = [&](auto n) { return one_of<decltype(n)::value, TC, TR, CLUSTER>(q.p, t, group, stages, full, empty, staging + group * G::STAGING, ring); };
      (void)(run(std::integral_constant<int, 256>()) || run(std::integral_constant<int, 224>()) || run(std::integral_constant<int, 192>()) || run(std::integral_constant<int, 160>()) ||
             run(std::integral_constant<int, 128>()) || run(std::integral_constant<int, 96>()) || run(std::integral_constant<int, 64>()) || run(std::integral_constant<int, 32>()));
    }
  }
  if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");  // neighbours may still arrive here
#endif
}

#ifdef LCTX_HOPPER
int launch_gemm_bf16_hopper_transposed(const GemmLaunch& p, cudaStream_t stream); /* op(a) a transpose */

/* Height of a plain product's tiles: the one with which all of them take least time, in waves of blocks. A step of lower tiles waits for its copies. */
inline int hopper_height(const GemmLaunch& p, int64_t blocks) {
  const int64_t products = (p.n + HopperGemm::COLUMNS - 1) / HopperGemm::COLUMNS * (p.splits > 1 ? p.splits : 1);
  int best = HopperGemm::ROWS;
  int64_t least = INT64_MAX;
  for (int height = HopperGemm::ROWS; height >= HopperGemm::STEP; height -= HopperGemm::STEP) {
    const int64_t waves = ((p.m + height - 1) / height * products + blocks - 1) / blocks, clocks = height * 4, copies = 300 + height * 9 / 4, cost = waves * (clocks > copies ? clocks : copies);
    if (cost < least) {
      least = cost;
      best = height;
    }
  }
  return best;
}

template <int TC, int TR, int CLUSTER = 1>
int launch_gemm_hopper(const GemmLaunch& p, cudaStream_t stream, int force_height = 0, int band_rows = kGroupRows) {
  using G = HopperGemm;
  HopperLaunch q;
  q.p = p;
  const auto [m, n, k, ldb] = std::tuple(static_cast<uint64_t>(p.m), static_cast<uint64_t>(p.n), static_cast<uint64_t>(p.k), static_cast<uint64_t>(p.ldb) * 2);
  const uint64_t experts = p.offsets == nullptr ? 1 : static_cast<uint64_t>(p.experts);
  const uint64_t column_sizes[3] = {TC ? n : k, TC ? k : n, experts}, row_sizes[2] = {TR ? m : k, TR ? k : m};
  const uint64_t column_strides[2] = {ldb, p.offsets == nullptr ? ldb : static_cast<uint64_t>(p.stride_b) * 2}, row_strides[1] = {static_cast<uint64_t>(p.lda) * 2};
  const uint32_t box[3] = {64, 64, 1};
  if (const int e = tensor_map(&q.columns, p.b, 3, column_sizes, column_strides, box)) return e;
  if (const int e = tensor_map(&q.rows, p.a, 2, row_sizes, row_strides, box)) return e;
  auto* kernel = gemm_hopper_kernel<TC, TR, CLUSTER>;
  if (const int e = allow_shared_memory(reinterpret_cast<const void*>(kernel), kHopperGemmShared)) return e;
  const int64_t most = multiprocessors() / CLUSTER * CLUSTER;
  q.across = static_cast<int32_t>(((p.n + G::COLUMNS - 1) / G::COLUMNS + CLUSTER - 1) / CLUSTER * CLUSTER);
  q.height = force_height ? force_height : p.offsets == nullptr ? hopper_height(p, most) : G::ROWS;
  q.band = std::max(1, band_rows / q.height);
  int64_t blocks = most;
  if (p.offsets == nullptr) blocks = std::min<int64_t>(most, (p.m + q.height - 1) / q.height * q.across * (p.splits > 1 ? p.splits : 1));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(G::THREADS);
  config.dynamicSmemBytes = kHopperGemmShared;
  config.stream = stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {CLUSTER, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = CLUSTER > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, q);
}
#endif

}  // namespace lctx::cuda
#endif
