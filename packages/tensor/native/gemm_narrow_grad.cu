/* Weight gradients of LoRA: x^T d or d^T x, where x is bf16 [k, many] and read once, d is f32 [k, at most 64], and k counts tokens. A block takes 64 columns of x, a warp
 * every eighth 16 tokens of them. Long k are cut further (gemm_splits), and the pieces joined in order. */
#include "gemm_narrow.cuh"

namespace lctx::cuda::narrow {
namespace {

constexpr int BX = 64, BK = 16;

/* X_FIRST: c = x^T d [columns of x, columns of d]; else its transpose, d^T x. NT: eights of d's columns per block. */
template <bool X_FIRST, int NT, bool VECTOR>
__global__ void __launch_bounds__(THREADS, NT >= 4 ? 1 : 2) gradient_kernel(const __grid_constant__ GemmLaunch p) {
  __shared__ float scratch[WARPS / 2 * 32 * 16 * NT];
  TileOf tile;
  if (!(X_FIRST ? find_tile<BX, NT * 8>(p, blockIdx.x, &tile) : find_tile<NT * 8, BX>(p, blockIdx.x, &tile))) return;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t x0 = (X_FIRST ? tile.m : tile.n) * BX, d0 = (X_FIRST ? tile.n : tile.m) * NT * 8;
  const int64_t width = X_FIRST ? p.m : p.n, rank = X_FIRST ? p.n : p.m, ldx = X_FIRST ? p.lda : p.ldb, ldd = X_FIRST ? p.ldb : p.lda;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(X_FIRST ? p.a : p.b) + (X_FIRST ? tile.a : tile.b) + x0 + g * 8;
  const float* d = static_cast<const float*>(X_FIRST ? p.b : p.a) + (X_FIRST ? tile.b : tile.a) + d0 + g;
  const int64_t columns = width - x0 - g * 8;  // of x, from this lane's eight on

  float sums[4][NT][4] = {};
  uint4 next[4];
  float next_d[NT][4];
  // A lane has tokens k .. k + 3: eight columns of x, and a column of d in each of NT.
  const auto load = [&](int64_t k) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      next[i] = load8<VECTOR>(x + (k + i) * ldx, k + i < tile.k ? columns : 0);
#pragma unroll
      for (int j = 0; j < NT; j++) next_d[j][i] = k + i < tile.k && d0 + j * 8 + g < rank ? __ldg(d + (k + i) * ldd + j * 8) : 0.0f;
    }
  };
  load(warp * BK + t * 4);
#pragma unroll 2
  for (int64_t k = warp * BK + t * 4; k - t * 4 < tile.k; k += WARPS * BK) {
    uint32_t fragments[4][4];
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      const uint32_t even[4] = {next[2 * pair].x, next[2 * pair].y, next[2 * pair].z, next[2 * pair].w};
      const uint32_t odd[4] = {next[2 * pair + 1].x, next[2 * pair + 1].y, next[2 * pair + 1].z, next[2 * pair + 1].w};
#pragma unroll
      for (int q = 0; q < 4; q++) {
        fragments[q][2 * pair] = __byte_perm(even[q], odd[q], 0x5410);      // two tokens of column 8 g + 2 q
        fragments[q][2 * pair + 1] = __byte_perm(even[q], odd[q], 0x7632);  // and of the next
      }
    }
    uint32_t parts[NT][2][3];
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++) split(next_d[j][2 * pair], next_d[j][2 * pair + 1], parts[j][pair]);
    load(k + WARPS * BK);
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int q = 0; q < 4; q++) {
        float step[4] = {};
#pragma unroll
        for (int part = 2; part >= 0; part--) mma(step, fragments[q], parts[j][0][part], parts[j][1][part]);
#pragma unroll
        for (int e = 0; e < 4; e++) sums[q][j][e] += step[e];
      }
  }
  add_warps<16 * NT>(&sums[0][0][0], scratch);
  if (warp != 0) return;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int64_t column = x0 + g * 8 + 2 * q + e / 2, r = d0 + j * 8 + 2 * t + e % 2;
        if (column >= width || r >= rank) continue;
        store_c(p, tile.c + (X_FIRST ? column * p.ldc + r : r * p.ldc + column), p.alpha * sums[q][j][e]);
      }
}

template <bool X_FIRST, int NT>
int launch(const GemmLaunch& p, cudaStream_t s) {
  const int64_t width = X_FIRST ? p.m : p.n;
  const bool vector = width % 8 == 0 && (X_FIRST ? aligned(p.a, p.lda, 0, 8) : aligned(p.b, p.ldb, 0, 8));
  const uint32_t blocks = X_FIRST ? TileGrid<BX, NT * 8>(p).count(p) : TileGrid<NT * 8, BX>(p).count(p);
  if (vector) gradient_kernel<X_FIRST, NT, true><<<blocks, THREADS, 0, s>>>(p);
  else gradient_kernel<X_FIRST, NT, false><<<blocks, THREADS, 0, s>>>(p);
  return cudaGetLastError();
}
template <bool X_FIRST>
int launch(const GemmLaunch& p, cudaStream_t s) {
  const int64_t rank = X_FIRST ? p.n : p.m;
  return rank <= 8 ? launch<X_FIRST, 1>(p, s) : rank <= 16 ? launch<X_FIRST, 2>(p, s) : launch<X_FIRST, 4>(p, s);
}

}  // namespace

int launch_gradient(const GemmLaunch& p, bool a_f32, cudaStream_t s) { return a_f32 ? launch<false>(p, s) : launch<true>(p, s); }

}  // namespace lctx::cuda::narrow
