/* c [m, n] = alpha a op(b) + beta c with f32 a [m, k <= 64] and b: h B^T of LoRA, d A, a router's gradient to its input. What bounds it is reading and writing c. A warp keeps the
 * parts of 32 columns of b in registers and goes down its rows 16 at a time; what it needs of the next 16 (32 where registers allow: DEPTH) is asked for before the present are
 * multiplied. */
#include "gemm_narrow.cuh"

namespace lctx::cuda::narrow {
namespace {

constexpr int COLUMNS = 32 * WARPS; /* of c, per block */

/* KS: 16s of k, or 0 for k <= 8, where the upper half of a step's k is empty. VECTOR: a lane's neighbours in a and c can be accessed at once. ROWS: of c, per block. */
template <int KS, bool K_CONTIGUOUS, bool VECTOR, int ROWS, int DEPTH>
__global__ void __launch_bounds__(THREADS, KS >= 4 ? 1 : 2) update_kernel(const __grid_constant__ GemmLaunch p) {
  constexpr int STEPS = KS == 0 ? 1 : KS, PAIRS = KS == 0 ? 1 : 2;
  TileOf tile;
  if (!find_tile<ROWS, COLUMNS>(p, blockIdx.x, &tile)) return;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t n0 = tile.n * COLUMNS + warp * 32, m_first = tile.m * ROWS, m_end = min(m_first + ROWS, tile.rows);
  if (n0 >= p.n) return;
  const float* a = static_cast<const float*>(p.a) + tile.a;
  const float* b = static_cast<const float*>(p.b) + tile.b;
  const int k_end = static_cast<int>(p.k);
  // A lane's first k of step s: it has 2 * PAIRS neighbours, so that both operands are read in whole sectors.
  const auto k_of = [&](int s) { return KS == 0 ? 2 * t : s * 16 + 4 * t; };

  // Columns are permuted over the four tiles such that a lane's elements of c are eight neighbours.
  uint32_t pb[STEPS][4][2][3] = {};
#pragma unroll
  for (int s = 0; s < STEPS; s++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int64_t n = n0 + g / 2 * 8 + 2 * j + g % 2;
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        const int k = k_of(s) + 2 * pair;
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; e++) v[e] = n < p.n && k + e < k_end ? __ldg(b + (K_CONTIGUOUS ? n * p.ldb + k + e : (k + e) * p.ldb + n)) : 0.0f;
        split(v[0], v[1], pb[s][j][pair]);
      }
    }

  const int64_t column = n0 + 8 * t;
  float ahead_a[DEPTH][STEPS][2][2 * PAIRS];
  uint4 ahead_c[DEPTH][2];
  const auto load = [&](int64_t m0, float(&next_a)[STEPS][2][2 * PAIRS], uint4(&next_c)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = m0 + h * 8 + g;
      const bool exists = row < m_end;
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const float* at = a + row * p.lda + k_of(s);
        float(&v)[2 * PAIRS] = next_a[s][h];
        if constexpr (VECTOR) {
          const bool some = exists && k_of(s) < k_end;
          if constexpr (PAIRS == 1) {
            const float2 x = some ? __ldg(reinterpret_cast<const float2*>(at)) : make_float2(0, 0);
            v[0] = x.x, v[1] = x.y;
          } else {
            const float4 x = some ? __ldg(reinterpret_cast<const float4*>(at)) : make_float4(0, 0, 0, 0);
            v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
          }
        } else {
#pragma unroll
          for (int e = 0; e < 2 * PAIRS; e++) v[e] = exists && k_of(s) + e < k_end ? __ldg(at + e) : 0.0f;
        }
      }
      if constexpr (VECTOR) {
        next_c[h] = make_uint4(0, 0, 0, 0);
        if (p.beta != 0.0f && !p.c_f32 && exists && column < p.n)
          next_c[h] = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.c) + tile.c + row * p.ldc + column);
      }
    }
  };
  const auto multiply = [&](int64_t m0, float(&next_a)[STEPS][2][2 * PAIRS], uint4(&next_c)[2]) {
    uint4 before[2];
    if constexpr (VECTOR) before[0] = next_c[0], before[1] = next_c[1];
    uint32_t pa[STEPS][3][4];
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
          uint32_t parts[3] = {0, 0, 0};
          if (pair < PAIRS) split(next_a[s][h][2 * pair], next_a[s][h][2 * pair + 1], parts);
#pragma unroll
          for (int part = 0; part < 3; part++) pa[s][part][h + 2 * pair] = parts[part];
        }
    if (m0 + 16 * DEPTH < m_end) load(m0 + 16 * DEPTH, next_a, next_c);

    float large[4][4] = {}, small[4][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t(&q)[2][3] = pb[s][j];
        mma(small[j], pa[s][2], q[0][0], q[1][0]);
        mma(small[j], pa[s][0], q[0][2], q[1][2]);
        mma(small[j], pa[s][1], q[0][1], q[1][1]);
        mma(small[j], pa[s][1], q[0][0], q[1][0]);
        mma(small[j], pa[s][0], q[0][1], q[1][1]);
        mma(large[j], pa[s][0], q[0][0], q[1][0]);
      }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = m0 + h * 8 + g;
      if (row >= m_end || column >= p.n) continue;
      const int64_t to = tile.c + row * p.ldc + column;
      float v[8];
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] = p.alpha * (large[e / 2][h * 2 + e % 2] + small[e / 2][h * 2 + e % 2]);
      if constexpr (VECTOR) {
        if (p.c_f32) {
          float4* c = reinterpret_cast<float4*>(static_cast<float*>(p.c) + to);
#pragma unroll
          for (int q = 0; q < 2; q++) {
            const float* w = v + 4 * q;
            float4 out = make_float4(w[0], w[1], w[2], w[3]);
            if (p.beta != 0.0f) {
              const float4 old = c[q];
              out = make_float4(w[0] + p.beta * old.x, w[1] + p.beta * old.y, w[2] + p.beta * old.z, w[3] + p.beta * old.w);
            }
            c[q] = out;
          }
        } else {
          const uint32_t words[4] = {before[h].x, before[h].y, before[h].z, before[h].w};
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
  };
#pragma unroll
  for (int d = 0; d < DEPTH; d++) load(m_first + 16 * d, ahead_a[d], ahead_c[d]);
#pragma unroll 1
  for (int64_t m0 = m_first; m0 < m_end; m0 += 16 * DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
      if (m0 + 16 * d < m_end) multiply(m0 + 16 * d, ahead_a[d], ahead_c[d]);
  }
}

template <int KS, bool K_CONTIGUOUS, int ROWS, int DEPTH>
int launch(const GemmLaunch& p, cudaStream_t s) {
  const int64_t neighbours = KS == 0 ? 2 : 4;
  const bool vector_a = p.k % neighbours == 0 && aligned(p.a, p.lda, 0, neighbours), vector_c = p.n % 8 == 0 && aligned(p.c, p.ldc, p.stride_c, 8);
  const uint32_t blocks = TileGrid<ROWS, COLUMNS>(p).count(p);
  if (vector_a && vector_c) update_kernel<KS, K_CONTIGUOUS, true, ROWS, DEPTH><<<blocks, THREADS, 0, s>>>(p);
  else update_kernel<KS, K_CONTIGUOUS, false, ROWS, 1><<<blocks, THREADS, 0, s>>>(p);
  return cudaGetLastError();
}
template <int KS, int ROWS, int DEPTH = 1>
int launch(const GemmLaunch& p, cudaStream_t s) {
  return p.trans_b ? launch<KS, true, ROWS, DEPTH>(p, s) : launch<KS, false, ROWS, DEPTH>(p, s);
}

}  // namespace

int launch_update(const GemmLaunch& p, cudaStream_t s) {
  if (p.k <= 8) return launch<0, 64, 2>(p, s);
  if (p.k <= 16) return launch<1, 64>(p, s);
  if (p.k <= 32) return launch<2, 64>(p, s);
  // With so much of b, four times the rows for each time that it is read and split, once they fill the card.
  return TileGrid<256, COLUMNS>(p).count(p) >= multiprocessors() ? launch<4, 256>(p, s) : launch<4, 64>(p, s);
}

}  // namespace lctx::cuda::narrow
