/* FlashAttention-2 (Dao 2023) on mma.sync: a block owns BM rows (queries x heads of a K/V group) and walks over the key tiles that any of them sees, from the
 * last to the first, with an online softmax. Scores, probabilities and the output stay in registers. */
#include "tiles.cuh"

namespace attention::cuda {
namespace {

template <int HD_, int MI_, int WARPS_, int BN_, int CTAS_, bool QREG_>
struct Config {
  static constexpr int HD = HD_, MI = MI_, WARPS = WARPS_, BN = BN_, CTAS = CTAS_, THREADS = WARPS * 32, BM = MI * 16 * WARPS;
  static constexpr bool QREG = QREG_;  // q's fragments stay in registers
  static constexpr int Q_BYTES = BM * HD * 2, TILE = BN * HD * 2, SMEM = Q_BYTES + 4 * TILE + BM * 8;
  static_assert(SMEM <= kSharedEverywhere, "shared memory");
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::CTAS) forward_kernel(const __grid_constant__ Forward f) {
  constexpr int HD = C::HD, MI = C::MI, BN = C::BN, BM = C::BM, THREADS = C::THREADS, KK = HD / 16;
  extern __shared__ __align__(128) unsigned char smem[];
  const Problem& p = f.p;
  const int rows = p.n * p.group, tiles = (rows + BM - 1) / BM;
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x) / p.kv_heads, kv_head = static_cast<int>(blockIdx.x) % p.kv_heads;  // dearest first
  const int row0 = tile * BM;
  const int first_query = query_of(p, row0), last_query = query_of(p, min(row0 + BM, rows) - 1);
  const int key_begin = first_key(p, first_query), key_end = p.start + last_query + 1;
  const int open_begin = first_key(p, last_query), open_end = p.start + first_query + 1;  // keys that every row sees
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const uint32_t sq = smem_address(smem), sk = sq + C::Q_BYTES, sv = sk + 2 * C::TILE;
  int2* visible = reinterpret_cast<int2*>(smem + C::Q_BYTES + 4 * C::TILE);  // per row: first and last key
  const bf16* q = static_cast<const bf16*>(p.q) + static_cast<int64_t>(kv_head) * p.group * p.dim;
  const KeyTiles<HD, BN, THREADS> k_tiles(p.k, p.k_stride, kv_head, p.dim), v_tiles(p.v, p.v_stride, kv_head, p.dim);

  load_tile<HD, BM, THREADS>(sq, p.dim, p.q, [&](int r) -> const bf16* {
    const int row = row0 + r, query = query_of(p, row);
    return row < rows ? q + query * p.q_stride + (row - query * p.group) * p.dim : nullptr;
  });
  for (int r = threadIdx.x; r < BM; r += THREADS) {
    const int query = query_of(p, min(row0 + r, rows - 1));
    visible[r] = make_int2(first_key(p, query), p.start + query);
  }
  const int first_tile = key_begin / BN;
  int step = (key_end - 1) / BN;
  auto load = [&](int at, int stage) {
    k_tiles.load(sk + stage * C::TILE, at * BN, key_begin, key_end, p.dim, p.k);
    v_tiles.load(sv + stage * C::TILE, at * BN, key_begin, key_end, p.dim, p.v);
    cp_async_commit();
  };
  load(step, 0);

  const Fragment<HD> fq = a_fragment<HD>(warp * MI * 16), fk = b_fragment<HD>(), fv = t_fragment<HD>();
  float o[MI][HD / 8][4] = {};
  float top[MI][2], sum[MI][2] = {};
  uint32_t rq[C::QREG ? KK : 1][MI][4];
#pragma unroll
  for (int i = 0; i < MI; i++) top[i][0] = top[i][1] = -1e30f;
  // exp(scale s) = 2^(c s). A scale of 0 must still send masked scores (-inf) to 0.
  const float c = fmaxf(fabsf(p.scale) * kLog2e, 1e-30f);
  const bool negative = p.scale < 0;

  bool first = true;
  int stage = 0;
#pragma unroll 1
  for (; step >= first_tile; step--, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (step > first_tile) load(step - 1, stage ^ 1);
    if (C::QREG && first) {
#pragma unroll
      for (int kk = 0; kk < KK; kk++) load_fragments(rq[C::QREG ? kk : 0], fq, sq, kk);
      first = false;
    }

    const int key0 = step * BN;
    const bool masked = key0 + BN > open_end || key0 < open_begin;
    // None of these keys is seen by this warp's rows.
    if (masked && (key0 > visible[warp * MI * 16 + MI * 16 - 1].y || key0 + BN <= visible[warp * MI * 16].x)) continue;

    float s[MI][BN / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < KK; kk++) {
      if (!C::QREG) load_fragments(rq[0], fq, sq, kk);
      multiply_rows(s, rq[C::QREG ? kk : 0], fk, sk + stage * C::TILE, kk);
    }
    if (negative) {
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < BN / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) s[i][j][e] = -s[i][j][e];
    }
    if (masked) {
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int2 see = visible[warp * MI * 16 + i * 16 + h * 8 + lane / 4];
#pragma unroll
          for (int j = 0; j < BN / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const int key = key0 + j * 8 + lane % 4 * 2 + e;
              if (key < see.x || key > see.y) s[i][j][h * 2 + e] = -INFINITY;
            }
        }
    }

    bool moved = false;
    float shrink[MI][2];
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float m = fmaxf(s[i][0][h * 2], s[i][0][h * 2 + 1]);
#pragma unroll
        for (int j = 1; j < BN / 8; j++) m = fmaxf(m, fmaxf(s[i][j][h * 2], s[i][j][h * 2 + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        m = fmaxf(m, top[i][h]);
        shrink[i][h] = exp2_fast((top[i][h] - m) * c);
        moved |= m != top[i][h];
        top[i][h] = m;
        const float mc = m * c;
        float partial = 0;
#pragma unroll
        for (int j = 0; j < BN / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float x = exp2_fast(fmaf(s[i][j][h * 2 + e], c, -mc));
            s[i][j][h * 2 + e] = x;
            partial += x;
          }
        sum[i][h] = sum[i][h] * shrink[i][h] + partial;
      }
    if (__any_sync(~0u, moved)) {
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < HD / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) o[i][j][e] *= shrink[i][e / 2];
    }
#pragma unroll
    for (int kk = 0; kk < BN / 16; kk++) {
      uint32_t a[MI][4];
#pragma unroll
      for (int i = 0; i < MI; i++) pack_columns(a[i], s[i], kk);
      multiply_columns(o, a, fv, sv + stage * C::TILE, kk);
    }
  }

#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float l = sum[i][h];
      l += __shfl_xor_sync(~0u, l, 1);
      l += __shfl_xor_sync(~0u, l, 2);
      const int row = row0 + warp * MI * 16 + i * 16 + h * 8 + lane / 4;
      const bool exists = row < rows;
      const int query = query_of(p, exists ? row : 0), head = kv_head * p.group + (exists ? row : 0) - query * p.group;
      float m = top[i][h] * c, factor = 1;  // in powers of two
      if (p.sinks) {
        const float sink = p.sinks[head] * kLog2e, both = fmaxf(m, sink);
        factor = exp2f(m - both);
        l = l * factor + exp2f(sink - both);
        m = both;
      }
      if (exists && lane % 4 == 0) f.lse[static_cast<int64_t>(query) * p.heads + head] = m * kLn2 + logf(l);
      store_row<HD>(exists ? static_cast<bf16*>(f.out) + query * f.out_stride + head * p.dim : nullptr, o[i], h, factor / l, p.dim);
    }
}

template <class C>
int start(const Forward& f, void* stream) {
  const int64_t rows = static_cast<int64_t>(f.p.n) * f.p.group;
  return launch(forward_kernel<C>, (rows + C::BM - 1) / C::BM * f.p.kv_heads, C::THREADS, C::SMEM, f, stream);
}

}  // namespace

int forward(const Forward& f, void* stream) {
  if (f.p.dim <= 32) return start<Config<32, 2, 4, 64, 2, true>>(f, stream);
  if (f.p.dim <= 64) return start<Config<64, 2, 4, 64, 2, true>>(f, stream);
  if (f.p.dim <= 96) return start<Config<96, 2, 4, 64, 1, false>>(f, stream);
  if (f.p.dim <= 128) return start<Config<128, 2, 4, 64, 1, false>>(f, stream);
  if (f.p.dim <= 192) return start<Config<192, 1, 4, 32, 1, false>>(f, stream);
  return start<Config<256, 1, 4, 32, 1, false>>(f, stream);
}

}  // namespace attention::cuda
