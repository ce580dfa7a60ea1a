/* c [m, n <= 128] = a op(b): a bf16 [m, k], read once; b f32. x A^T of LoRA, d B, a router's logits. A warp takes 16 or 32 rows and every eighth or sixteenth 32 of k; the block's
 * warps are added up in the end. */
#include "gemm_narrow.cuh"

namespace lctx::cuda::narrow {
namespace {

constexpr int BK = 32;

/* Eight of column n's k as three parts; [part][pair]. */
template <bool K_CONTIGUOUS, bool VECTOR>
__device__ __forceinline__ void load_b(const float* b, int64_t ldb, int64_t n, bool exists, int64_t k, int64_t k_end, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = 0;
  if (!exists) return;
  if constexpr (K_CONTIGUOUS && VECTOR) {
    if (k >= k_end) return;
    const float4* at = reinterpret_cast<const float4*>(b + n * ldb + k);
    const float4 x = __ldg(at), y = __ldg(at + 1);
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w, v[4] = y.x, v[5] = y.y, v[6] = y.z, v[7] = y.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (k + i < k_end) v[i] = __ldg(b + (K_CONTIGUOUS ? n * ldb + k + i : (k + i) * ldb + n));
  }
}

/* Warps that share k: more where a step takes longer. (By n alone: an element's bits do not depend on m.) */
constexpr int warps_of(int nt) { return nt >= 4 ? 16 : 8; }

template <int MT, int NT, bool K_CONTIGUOUS, bool VECTOR>
__global__ void __launch_bounds__(warps_of(NT) * 32, NT >= 4 ? 1 : 2) rows_kernel(const __grid_constant__ GemmLaunch p) {
  constexpr int WARPS = warps_of(NT), HALF = MT * NT > 8 ? 2 : 1;  // the sums are joined in one or two parts: 32 KiB at a time
  __shared__ float scratch[WARPS / 2 * 32 * MT * NT * 4 / HALF];
  TileOf tile;
  if (!find_tile<MT * 16, NT * 8>(p, blockIdx.x, &tile)) return;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t m0 = tile.m * MT * 16, n0 = tile.n * NT * 8;
  const __nv_bfloat16* a = static_cast<const __nv_bfloat16*>(p.a) + tile.a + (m0 + g) * p.lda;
  const float* b = static_cast<const float*>(p.b) + tile.b;

  float sums[MT][NT][4] = {};
  uint4 next[MT][2];
  const auto load = [&](int64_t k) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) next[i][h] = load8<VECTOR>(a + (i * 16 + h * 8) * p.lda + k, m0 + i * 16 + h * 8 + g < tile.rows ? tile.k - k : 0);
  };
  load(warp * BK + t * 8);
#pragma unroll NT >= 4 ? 1 : 2
  for (int64_t k = warp * BK + t * 8; k - t * 8 < tile.k; k += WARPS * BK) {
    uint4 x[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) x[i][0] = next[i][0], x[i][1] = next[i][1];
    load(k + WARPS * BK);
#pragma unroll
    for (int j = 0; j < NT; j++) {
      float v[8];
      load_b<K_CONTIGUOUS, VECTOR>(b, p.ldb, n0 + j * 8 + g, n0 + j * 8 + g < p.n, k, tile.k, v);
      uint32_t parts[4][3];
#pragma unroll
      for (int i = 0; i < 4; i++) split(v[2 * i], v[2 * i + 1], parts[i]);
#pragma unroll
      for (int i = 0; i < MT; i++) {
        const uint32_t first[4] = {x[i][0].x, x[i][1].x, x[i][0].y, x[i][1].y}, second[4] = {x[i][0].z, x[i][1].z, x[i][0].w, x[i][1].w};
        float step[4] = {};
#pragma unroll
        for (int part = 2; part >= 0; part--) {
          mma(step, first, parts[0][part], parts[1][part]);
          mma(step, second, parts[2][part], parts[3][part]);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) sums[i][j][e] += step[e];
      }
    }
  }
#pragma unroll
  for (int half = 0; half < HALF; half++) {
    add_warps<MT * NT * 4 / HALF, WARPS>(&sums[0][0][0] + half * (MT * NT * 4 / HALF), scratch);
    if (half + 1 < HALF) __syncthreads();
  }
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int64_t row = m0 + i * 16 + e / 2 * 8 + g, column = n0 + j * 8 + t * 2 + e % 2;
        if (row < tile.rows && column < p.n) store_c(p, tile.c + row * p.ldc + column, p.alpha * sums[i][j][e]);
      }
}

template <int MT, int NT, bool K_CONTIGUOUS>
int launch(const GemmLaunch& p, cudaStream_t s) {
  const bool vector = p.k % 8 == 0 && aligned(p.a, p.lda, 0, 8) && (!K_CONTIGUOUS || aligned(p.b, p.ldb, p.stride_b, 4));
  const uint32_t blocks = TileGrid<MT * 16, NT * 8>(p).count(p);
  if (vector) rows_kernel<MT, NT, K_CONTIGUOUS, true><<<blocks, warps_of(NT) * 32, 0, s>>>(p);
  else rows_kernel<MT, NT, K_CONTIGUOUS, false><<<blocks, warps_of(NT) * 32, 0, s>>>(p);
  return cudaGetLastError();
}
template <int MT, int NT>
int launch(const GemmLaunch& p, cudaStream_t s) {
  return p.trans_b ? launch<MT, NT, true>(p, s) : launch<MT, NT, false>(p, s);
}

}  // namespace

int launch_rows(const GemmLaunch& p, cudaStream_t s) {
  // 32 rows a block read b half as often, once there are blocks enough. (An element's bits are the same either way.)
  const bool many = p.m >= 6144;
  if (p.n <= 8) return many ? launch<2, 1>(p, s) : launch<1, 1>(p, s);
  if (p.n <= 16) return many ? launch<2, 2>(p, s) : launch<1, 2>(p, s);
  if (p.n <= 32) return many ? launch<2, 4>(p, s) : launch<1, 4>(p, s);
  return many ? launch<2, 8>(p, s) : launch<1, 8>(p, s);
}

}  // namespace lctx::cuda::narrow
