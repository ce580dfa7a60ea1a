/* Which tile of which product a block of a GEMM kernel owns. Plain and grouped, for bf16 and f32. */
#ifndef LCTX_GEMM_TILES_CUH
#define LCTX_GEMM_TILES_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace lctx::cuda {

struct TileOf {
  int64_t m, n;     /* in tiles */
  int64_t rows, k;  /* of this product */
  int64_t a, b, c;  /* element offsets of its operands */
};

/* Row tiles whose column neighbours run together: they share operands in L2. 8 x 256 rows by 16 x 128 columns is what an H100 runs at once. */
#ifndef LCTX_GROUP_ROWS
#define LCTX_GROUP_ROWS 2048
#endif
constexpr int kGroupRows = LCTX_GROUP_ROWS;

/* Rows [*start, *end) of an expert. Offsets are data on the device that nobody checked: they may be wrong, but never lead outside the operands. */
__device__ __forceinline__ void expert_rows(const GemmLaunch& p, int expert, int64_t rows, int64_t* start, int64_t* end) {
  const int64_t s = p.offsets[expert], e = p.offsets[expert + 1];
  *start = s < 0 ? 0 : s > rows ? rows : s;
  *end = e < *start ? *start : e > rows ? rows : e;
}

template <int BM, int BN>
struct TileGrid {
  uint32_t tiles_n, tiles_m; /* of one product; in mode 0 blocks count the experts' own row tiles, of which at most one per expert is partial */
  __host__ __device__ explicit TileGrid(const GemmLaunch& p) {
    tiles_n = static_cast<uint32_t>((p.n + BN - 1) / BN);
    tiles_m = static_cast<uint32_t>((p.m + BM - 1) / BM) + (p.offsets != nullptr && p.mode == 0 ? p.experts : 0);
  }
  __host__ uint32_t count(const GemmLaunch& p) const {
    return tiles_n * tiles_m * (p.offsets == nullptr ? (p.splits > 1 ? p.splits : 1) : p.mode == 1 ? p.experts : 1);
  }
};

/* The tile of number `index` of TileGrid::count, in bands of BAND rows. All lanes of a warp must call it. False: there is nothing to do. */
template <int BM, int BN, int BAND = kGroupRows>
__device__ __forceinline__ bool find_tile(const GemmLaunch& p, uint32_t index, TileOf* t) {
  const TileGrid<BM, BN> grid(p);
  constexpr uint32_t GROUP = BAND / BM;
  const uint32_t per_product = grid.tiles_n * grid.tiles_m, product = index / per_product, local = index % per_product;
  const uint32_t per_group = GROUP * grid.tiles_n, group = local / per_group, in_group = local % per_group;
  const uint32_t size = min(grid.tiles_m - group * GROUP, GROUP);
  *t = {static_cast<int64_t>(group * GROUP + in_group % size), static_cast<int64_t>(in_group / size), p.m, p.k, 0, 0, 0};
  if (p.offsets == nullptr) {
    if (p.splits <= 1) return true;
    // This tile's piece of k; pieces are added up by another kernel.
    const int64_t per = p.k_per_split, from = product * per;
    t->k = p.k - from < per ? p.k - from : per;
    t->a = from * (p.trans_a ? p.lda : 1);
    t->b = from * (p.trans_b ? 1 : p.ldb);
    t->c = product * p.m * p.n;
    return true;
  }
  int64_t start, end;
  if (p.mode == 1) {
    expert_rows(p, static_cast<int>(product), p.k, &start, &end);
    t->k = end - start;
    t->a = start * p.lda;  // stored [k, m]
    t->b = start * p.ldb;  // stored [k, n]
    t->c = product * p.stride_c;
    return true;
  }
  const int lane = threadIdx.x % 32;
  int left = static_cast<int>(t->m);
  for (int base = 0; base < p.experts; base += 32) {
    int tiles = 0;
    if (base + lane < p.experts) {
      expert_rows(p, base + lane, p.m, &start, &end);
      tiles = static_cast<int>((end - start + BM - 1) / BM);
    }
    int sum = tiles;  // of this lane's expert and those before it
    for (int o = 1; o < 32; o <<= 1) {
      const int below = __shfl_up_sync(~0u, sum, o);
      if (lane >= o) sum += below;
    }
    const unsigned found = __ballot_sync(~0u, left < sum);
    if (found) {
      const int at = __ffs(static_cast<int>(found)) - 1;
      t->m = left - __shfl_sync(~0u, sum - tiles, at);
      expert_rows(p, base + at, p.m, &start, &end);
      t->rows = end - start;
      t->a = start * p.lda;
      t->b = (base + at) * p.stride_b;
      t->c = start * p.ldc;
      return true;
    }
    left -= __shfl_sync(~0u, sum, 31);
  }
  return false;
}

/* One element of c, `at` elements in: v (alpha included) + beta c. */
__device__ __forceinline__ void store_c(const GemmLaunch& p, int64_t at, float v) {
  if (p.c_f32) {
    float* c = static_cast<float*>(p.c) + at;
    *c = p.beta != 0.0f ? v + p.beta * *c : v;
  } else {
    __nv_bfloat16* c = static_cast<__nv_bfloat16*>(p.c) + at;
    *c = __float2bfloat16(p.beta != 0.0f ? v + p.beta * __bfloat162float(*c) : v);
  }
}

/* Of the current device. */
uint32_t multiprocessors();

}  // namespace lctx::cuda
#endif
