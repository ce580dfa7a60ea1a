/* c [m, n] = alpha a op(b) + beta c with f32 a [m, k <= 32] and b: h B^T of LoRA, d A, a router's gradient to its input. What bounds it is reading and writing c: a warp takes
 * 16 or 32 rows, keeps the parts of a in registers, and goes along c 32 columns at a time. */
#include "gemm_narrow.cuh"

namespace lctx::cuda::narrow {
namespace {

constexpr int COLUMNS = 256; /* per block: two warps side by side, 128 each */

/* KS: 16s of k, or 0 for k <= 8, where the upper half of a step's k is empty. */
template <int KS, int MT, bool K_CONTIGUOUS, bool VECTOR_C>
__global__ void __launch_bounds__(THREADS, 2) update_kernel(const __grid_constant__ GemmLaunch p) {
  constexpr int STEPS = KS == 0 ? 1 : KS, PAIRS = KS == 0 ? 1 : 2, ROWS = 16 * MT, BM = WARPS / 2 * ROWS;
  TileOf tile;
  if (!find_tile<BM, COLUMNS>(p, blockIdx.x, &tile)) return;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t m0 = tile.m * BM + warp / 2 * ROWS, n0 = tile.n * COLUMNS + warp % 2 * (COLUMNS / 2);
  if (m0 >= tile.rows || n0 >= p.n) return;
  const float* a = static_cast<const float*>(p.a) + tile.a;
  const float* b = static_cast<const float*>(p.b) + tile.b;
  const int k_end = static_cast<int>(p.k);
  // k of this lane's pair i in step s: neighbours, so that both operands are read in whole sectors.
  const auto k_of = [&](int s, int i) { return KS == 0 ? 2 * t : s * 16 + 4 * t + 2 * i; };

  uint32_t pa[MT][STEPS][3][4];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t row = m0 + i * 16 + h * 8 + g;
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
          uint32_t parts[3] = {0, 0, 0};
          if (pair < PAIRS) {
            const int k = k_of(s, pair);
            const bool exists = row < tile.rows;
            split(exists && k < k_end ? __ldg(a + row * p.lda + k) : 0.0f, exists && k + 1 < k_end ? __ldg(a + row * p.lda + k + 1) : 0.0f, parts);
          }
#pragma unroll
          for (int part = 0; part < 3; part++) pa[i][s][part][h + 2 * pair] = parts[part];
        }
      }

  // Column of c that a lane's element e of tile j is: eight neighbours over the four tiles.
  const int64_t lane_column = n0 + 8 * t;
#pragma unroll 1
  for (int64_t at = 0; at < COLUMNS / 2 && n0 + at < p.n; at += 32) {
    const int64_t column = lane_column + at;
    uint4 before[MT][2];
    if constexpr (VECTOR_C) {
      // Asked for before the products, needed after them.
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int64_t row = m0 + i * 16 + h * 8 + g;
          before[i][h] = make_uint4(0, 0, 0, 0);
          if (p.beta != 0.0f && !p.c_f32 && row < tile.rows && column < p.n)
            before[i][h] = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.c) + tile.c + row * p.ldc + column);
        }
    }
    float large[MT][4][4] = {}, small[MT][4][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int64_t n = n0 + at + g / 2 * 8 + 2 * j + g % 2;
        uint32_t pb[2][3] = {};
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
          const int k = k_of(s, pair);
          float v[2];
#pragma unroll
          for (int e = 0; e < 2; e++) v[e] = n < p.n && k + e < k_end ? __ldg(b + (K_CONTIGUOUS ? n * p.ldb + k + e : (k + e) * p.ldb + n)) : 0.0f;
          split(v[0], v[1], pb[pair]);
        }
#pragma unroll
        for (int i = 0; i < MT; i++) {
          mma(small[i][j], pa[i][s][2], pb[0][0], pb[1][0]);
          mma(small[i][j], pa[i][s][0], pb[0][2], pb[1][2]);
          mma(small[i][j], pa[i][s][1], pb[0][1], pb[1][1]);
          mma(small[i][j], pa[i][s][1], pb[0][0], pb[1][0]);
          mma(small[i][j], pa[i][s][0], pb[0][1], pb[1][1]);
          mma(large[i][j], pa[i][s][0], pb[0][0], pb[1][0]);
        }
      }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t row = m0 + i * 16 + h * 8 + g;
        if (row >= tile.rows || column >= p.n) continue;
        const int64_t to = tile.c + row * p.ldc + column;
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = p.alpha * (large[i][e / 2][h * 2 + e % 2] + small[i][e / 2][h * 2 + e % 2]);
        if constexpr (VECTOR_C) {
          if (p.c_f32) {
            float4* c = reinterpret_cast<float4*>(static_cast<float*>(p.c) + to);
#pragma unroll
            for (int q = 0; q < 2; q++) {
              const float4 old = p.beta != 0.0f ? c[q] : make_float4(0, 0, 0, 0);
              float* w = v + 4 * q;
              c[q] = p.beta != 0.0f ? make_float4(w[0] + p.beta * old.x, w[1] + p.beta * old.y, w[2] + p.beta * old.z, w[3] + p.beta * old.w)
                                    : make_float4(w[0], w[1], w[2], w[3]);
            }
          } else {
            const uint32_t words[4] = {before[i][h].x, before[i][h].y, before[i][h].z, before[i][h].w};
            uint32_t out[4];
#pragma unroll
            for (int q = 0; q < 4; q++)
              out[q] = p.beta != 0.0f ? pack(v[2 * q] + p.beta * low_half(words[q]), v[2 * q + 1] + p.beta * high_half(words[q])) : pack(v[2 * q], v[2 * q + 1]);
            *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.c) + to) = make_uint4(out[0], out[1], out[2], out[3]);
          }
        } else {
#pragma unroll
          for (int e = 0; e < 8; e++)
            if (column + e < p.n) store_c(p, to + e, v[e]);
        }
      }
  }
}

template <int KS, int MT>
int launch(const GemmLaunch& p, cudaStream_t s) {
  constexpr int BM = WARPS / 2 * 16 * MT;
  const bool vector = p.n % 8 == 0 && aligned(p.c, p.ldc, p.stride_c, 8);
  const uint32_t blocks = TileGrid<BM, COLUMNS>(p).count(p);
  if (p.trans_b) {
    if (vector) update_kernel<KS, MT, true, true><<<blocks, THREADS, 0, s>>>(p);
    else update_kernel<KS, MT, true, false><<<blocks, THREADS, 0, s>>>(p);
  } else {
    if (vector) update_kernel<KS, MT, false, true><<<blocks, THREADS, 0, s>>>(p);
    else update_kernel<KS, MT, false, false><<<blocks, THREADS, 0, s>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

int launch_update(const GemmLaunch& p, cudaStream_t s) {
  if (p.k <= 8) return launch<0, 1>(p, s);
  if (p.k <= 16) return launch<1, 1>(p, s);
  return launch<2, 1>(p, s);
}

}  // namespace lctx::cuda::narrow
