/* dQ. A block owns BM rows (queries x heads of a K/V group) and walks over the keys they see, in order: dQ += (P (dO V^T - delta)) K. Everything but the
 * operands' tiles stays in registers. */
#include "tiles.cuh"

namespace attention::cuda {
namespace {

template <int HD_, int MI_, int WARPS_, int BN_, int CTAS_, bool REGS_>
struct Config {
  static constexpr int HD = HD_, MI = MI_, WARPS = WARPS_, BN = BN_, CTAS = CTAS_, THREADS = WARPS * 32, BM = MI * 16 * WARPS;
  static constexpr bool REGS = REGS_;  // q's and dout's fragments stay in registers
  static constexpr int ROWS_BYTES = BM * HD * 2, TILE = BN * HD * 2, SMEM = 2 * ROWS_BYTES + 4 * TILE + BM * 8;
  static_assert(SMEM <= kSharedEverywhere, "shared memory");
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::CTAS) q_kernel(const __grid_constant__ Backward b) {
  constexpr int HD = C::HD, MI = C::MI, BN = C::BN, BM = C::BM, THREADS = C::THREADS, KK = HD / 16;
  extern __shared__ __align__(128) unsigned char smem[];
  const Problem& p = b.p;
  const int rows = p.n * p.group, tiles = (rows + BM - 1) / BM;
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x) / p.kv_heads, kv_head = static_cast<int>(blockIdx.x) % p.kv_heads;
  const int row0 = tile * BM;
  const int first_query = query_of(p, row0), last_query = query_of(p, min(row0 + BM, rows) - 1);
  const int key_begin = first_key(p, first_query), key_end = p.start + last_query + 1;
  const int open_begin = first_key(p, last_query), open_end = p.start + first_query + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const uint32_t sq = smem_address(smem), sdo = sq + C::ROWS_BYTES, sk = sdo + C::ROWS_BYTES, sv = sk + 2 * C::TILE;
  int2* visible = reinterpret_cast<int2*>(smem + 2 * C::ROWS_BYTES + 4 * C::TILE);
  const int64_t head0 = static_cast<int64_t>(kv_head) * p.group;
  const bf16* q = static_cast<const bf16*>(p.q) + head0 * p.dim;
  const bf16* dout = static_cast<const bf16*>(b.dout) + head0 * p.dim;
  const KeyTiles<HD, BN, THREADS> k_tiles(p.k, p.k_stride, kv_head, p.dim), v_tiles(p.v, p.v_stride, kv_head, p.dim);
  auto row_of = [&](const bf16* from, int64_t stride, int r) -> const bf16* {
    const int row = row0 + r, query = query_of(p, row);
    return row < rows ? from + query * stride + (row - query * p.group) * p.dim : nullptr;
  };
  load_tile<HD, BM, THREADS>(sq, p.dim, p.q, [&](int r) { return row_of(q, p.q_stride, r); });
  load_tile<HD, BM, THREADS>(sdo, p.dim, b.dout, [&](int r) { return row_of(dout, b.dout_stride, r); });
  for (int r = threadIdx.x; r < BM; r += THREADS) {
    const int query = query_of(p, min(row0 + r, rows - 1));
    visible[r] = make_int2(first_key(p, query), p.start + query);
  }
  auto load = [&](int at, int stage) {
    k_tiles.load(sk + stage * C::TILE, at * BN, key_begin, key_end, p.dim, p.k);
    v_tiles.load(sv + stage * C::TILE, at * BN, key_begin, key_end, p.dim, p.v);
    cp_async_commit();
  };
  int step = key_begin / BN;
  const int last = (key_end - 1) / BN;
  load(step, 0);

  float lse[MI][2], delta[MI][2];
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = min(row0 + warp * MI * 16 + i * 16 + h * 8 + lane / 4, rows - 1), query = query_of(p, row);
      const int64_t at = static_cast<int64_t>(query) * p.heads + head0 + (row - query * p.group);
      lse[i][h] = b.lse[at] * kLog2e;
      delta[i][h] = b.delta[at];
    }
  const Fragment<HD> fa = a_fragment<HD>(warp * MI * 16), fb = b_fragment<HD>(), ft = t_fragment<HD>();
  float dq[MI][HD / 8][4] = {};
  const float c = p.scale * kLog2e;
  uint32_t rq[C::REGS ? KK : 1][MI][4], rdo[C::REGS ? KK : 1][MI][4];
  bool first = true;
  int stage = 0;
#pragma unroll 1
  for (; step <= last; step++, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (step < last) load(step + 1, stage ^ 1);
    if (C::REGS && first) {
#pragma unroll
      for (int kk = 0; kk < KK; kk++) {
        load_fragments(rq[C::REGS ? kk : 0], fa, sq, kk);
        load_fragments(rdo[C::REGS ? kk : 0], fa, sdo, kk);
      }
      first = false;
    }
    const int key0 = step * BN;
    const bool masked = key0 + BN > open_end || key0 < open_begin;
    // None of these keys is seen by this warp's rows.
    if (masked && (key0 > visible[warp * MI * 16 + MI * 16 - 1].y || key0 + BN <= visible[warp * MI * 16].x)) continue;
    const uint32_t tk = sk + stage * C::TILE, tv = sv + stage * C::TILE;
    float s[MI][BN / 8][4] = {}, d[MI][BN / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < KK; kk++) {
      if (!C::REGS) load_fragments(rq[0], fa, sq, kk);
      multiply_rows(s, rq[C::REGS ? kk : 0], fb, tk, kk);
    }
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[i][j][e] = exp2_fast(fmaf(s[i][j][e], c, -lse[i][e / 2]));
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
              if (key < see.x || key > see.y) s[i][j][h * 2 + e] = 0;
            }
        }
    }
#pragma unroll
    for (int kk = 0; kk < KK; kk++) {
      if (!C::REGS) load_fragments(rdo[0], fa, sdo, kk);
      multiply_rows(d, rdo[C::REGS ? kk : 0], fb, tv, kk);
    }
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[i][j][e] = s[i][j][e] * (d[i][j][e] - delta[i][e / 2]);
#pragma unroll
    for (int kk = 0; kk < BN / 16; kk++) {
      uint32_t a[MI][4];
#pragma unroll
      for (int i = 0; i < MI; i++) pack_columns(a[i], d[i], kk);
      multiply_columns(dq, a, ft, tk, kk);
    }
  }

#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = row0 + warp * MI * 16 + i * 16 + h * 8 + lane / 4, query = query_of(p, row);
      bf16* to = row < rows ? static_cast<bf16*>(b.dq) + query * b.dq_stride + (head0 + row - query * p.group) * p.dim : nullptr;
      store_row<HD>(to, dq[i], h, p.scale, p.dim);
    }
}

template <class C>
int start(const Backward& b, void* stream) {
  const int64_t rows = static_cast<int64_t>(b.p.n) * b.p.group;
  return launch(q_kernel<C>, (rows + C::BM - 1) / C::BM * b.p.kv_heads, C::THREADS, C::SMEM, b, stream);
}

}  // namespace

int backward_q(const Backward& b, void* stream) {
  if (b.p.dim <= 32) return start<Config<32, 2, 4, 64, 2, false>>(b, stream);
  if (b.p.dim <= 64) return start<Config<64, 2, 4, 64, 2, false>>(b, stream);
  if (b.p.dim <= 96) return start<Config<96, 2, 4, 32, 1, false>>(b, stream);
  if (b.p.dim <= 128) return start<Config<128, 2, 4, 32, 1, false>>(b, stream);
  if (b.p.dim <= 192) return start<Config<192, 1, 4, 32, 1, false>>(b, stream);
  return start<Config<256, 1, 4, 16, 1, false>>(b, stream);
}

}  // namespace attention::cuda
