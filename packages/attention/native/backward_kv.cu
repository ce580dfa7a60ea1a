/* dK and dV. A block owns BN keys of one K/V head and walks over the rows (queries x heads of the group) that see them, in order, so that every sum has one
 * order. Scores are computed transposed, keys as rows: the probabilities and their gradients are then already laid out as the left operands of
 * dV += P^T dO and dK += dS^T Q, and never leave registers. */
#include "tiles.cuh"

namespace attention::cuda {
namespace {

template <int HD_, int MI_, int WARPS_, int BM_, int CTAS_, int ROWS_ = BM_, int PARTS_ = 1>
struct Config {
  static constexpr int HD = HD_, MI = MI_, WARPS = WARPS_, BM = BM_, CTAS = CTAS_, THREADS = WARPS * 32, BN = MI * 16 * WARPS;
  static constexpr int ROWS = ROWS_;  // of a tile, worked on at a time: P and dP of all in f32 may be more than the registers hold beside dK and dV
  // A block sums one of PARTS parts of the head dims: dK and dV of wide heads are more than the registers hold. Scores are then computed PARTS times.
  static constexpr int PARTS = PARTS_, PD = HD / PARTS;
  static constexpr int KEYS = BN * HD * 2, TILE = BM * HD * 2, SMEM = 2 * KEYS + 4 * TILE + 2 * BM * 16;
  static_assert(BM <= THREADS && BM % ROWS == 0, "one thread per row; whole parts");
  static_assert(SMEM <= kSharedEverywhere, "shared memory");
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::CTAS) kv_kernel(const __grid_constant__ Backward b, int key_base) {
  constexpr int HD = C::HD, PD = C::PD, MI = C::MI, BN = C::BN, BM = C::BM, ROWS = C::ROWS, THREADS = C::THREADS;
  extern __shared__ __align__(128) unsigned char smem[];
  const Problem& p = b.p;
  const int kv_head = static_cast<int>(blockIdx.x) % p.kv_heads, group = p.group;
  const int work = static_cast<int>(blockIdx.x) / p.kv_heads, part = C::PARTS == 1 ? 0 : work % C::PARTS;
  const int key0 = key_base + work / C::PARTS * BN, keys = p.start + p.n;
  const int last_key = min(key0 + BN, keys) - 1;
  // Queries that see any of the keys.
  const int begin = max(0, key0 - p.start), end = end_of_queries(p, begin, last_key);
  if (begin >= end) return;
  const int row_begin = begin * group, row_end = end * group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const uint32_t sk = smem_address(smem), sv = sk + C::KEYS, sq = sv + C::KEYS, sdo = sq + 2 * C::TILE;
  // Per stage and row: lse in powers of two; delta; first and last key.
  float* row_lse = reinterpret_cast<float*>(smem + 2 * C::KEYS + 4 * C::TILE);
  float* row_delta = row_lse + 2 * BM;
  int2* row_keys = reinterpret_cast<int2*>(row_delta + 2 * BM);
  const int64_t head0 = static_cast<int64_t>(kv_head) * group;
  const bf16* q = static_cast<const bf16*>(p.q) + head0 * p.dim;
  const bf16* dout = static_cast<const bf16*>(b.dout) + head0 * p.dim;
  KeyTiles<HD, BN, THREADS>(p.k, p.k_stride, kv_head, p.dim).load(sk, key0, 0, keys, p.dim, p.k);
  KeyTiles<HD, BN, THREADS>(p.v, p.v_stride, kv_head, p.dim).load(sv, key0, 0, keys, p.dim, p.v);

  auto load = [&](int row0, int stage) {
    load_row_tiles<HD, BM, THREADS>(b, q, dout, sq + stage * C::TILE, sdo + stage * C::TILE, row0, row_end);
    cp_async_commit();
  };
  struct Row { float lse, delta; int2 keys; };
  auto fetch = [&](int row0) -> Row {
    if (threadIdx.x >= BM) return {};
    const int row = row0 + static_cast<int>(threadIdx.x), query = query_of(p, min(row, row_end - 1));
    const int64_t at = static_cast<int64_t>(query) * p.heads + head0 + (row - query * group);
    const int2 see = make_int2(first_key(p, query), p.start + query);
    if (row >= row_end) return {INFINITY, 0, see};  // probability 0
    return {b.lse[at] * kLog2e, b.delta[at], see};
  };
  auto keep = [&](int stage, const Row& row) {
    if (threadIdx.x >= BM) return;
    row_lse[stage * BM + threadIdx.x] = row.lse;
    row_delta[stage * BM + threadIdx.x] = row.delta;
    row_keys[stage * BM + threadIdx.x] = row.keys;
  };
  load(row_begin, 0);
  keep(0, fetch(row_begin));

  const Fragment<HD> fa = a_fragment<HD>(warp * MI * 16), fb = b_fragment<HD>(), ft = t_fragment<HD>();
  float dk[MI][PD / 8][4] = {}, dv[MI][PD / 8][4] = {};
  const float c = p.scale * kLog2e;
  int stage = 0;
#pragma unroll 1
  for (int row0 = row_begin; row0 < row_end; row0 += BM, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    const bool more = row0 + BM < row_end;
    Row next;
    if (more) {
      load(row0 + BM, stage ^ 1);
      next = fetch(row0 + BM);
    }
    const uint32_t tq = sq + stage * C::TILE, tdo = sdo + stage * C::TILE;
    const int column = stage * BM + lane % 4 * 2;  // this lane's first row of the tile

    const int2 see_first = row_keys[stage * BM], see_last = row_keys[stage * BM + BM - 1];
    const bool masked = see_first.y < key0 + BN - 1 || see_last.x > key0;
    if (masked) {  // none of this warp's keys is seen from here
      const int low = key0 + warp * MI * 16;
      if (low > see_last.y || low + MI * 16 <= see_first.x) {
        if (more) keep(stage ^ 1, next);
        continue;
      }
    }

#pragma unroll 1
    for (int r = 0; r < BM; r += ROWS) {
      const uint32_t q_rows = tq + r * Rows<HD>::BYTES, dout_rows = tdo + r * Rows<HD>::BYTES;
      const int at = column + r;
      // P^T = exp(scale K Q^T - lse)
      float s[MI][ROWS / 8][4] = {};
      multiply_tiles(s, fa, sk, fb, q_rows);
#pragma unroll
      for (int j = 0; j < ROWS / 8; j++) {
        const float2 lse = *reinterpret_cast<const float2*>(row_lse + at + j * 8);
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) s[i][j][e] = exp2_fast(fmaf(s[i][j][e], c, -(e % 2 ? lse.y : lse.x)));
      }
      if (masked) {
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int2 see = row_keys[at + j * 8 + e % 2];
#pragma unroll
            for (int i = 0; i < MI; i++) {
              const int key = key0 + warp * MI * 16 + i * 16 + e / 2 * 8 + lane / 4;
              if (key < see.x || key > see.y) s[i][j][e] = 0;
            }
          }
      }

      // dV += P^T dO
#pragma unroll
      for (int kk = 0; kk < ROWS / 16; kk++) {
        uint32_t a[MI][4];
#pragma unroll
        for (int i = 0; i < MI; i++) pack_columns(a[i], s[i], kk);
        multiply_columns(dv, a, ft, dout_rows, kk, part * (PD / 16));
      }

      // dS^T = P^T (V dO^T - delta)
      float d[MI][ROWS / 8][4] = {};
      multiply_tiles(d, fa, sv, fb, dout_rows);
      score_gradients(d, s, row_delta + at);
      // dK += dS^T Q
#pragma unroll
      for (int kk = 0; kk < ROWS / 16; kk++) {
        uint32_t a[MI][4];
#pragma unroll
        for (int i = 0; i < MI; i++) pack_columns(a[i], d[i], kk);
        multiply_columns(dk, a, ft, q_rows, kk, part * (PD / 16));
      }
    }
    if (more) keep(stage ^ 1, next);
  }

  add_to_keys(b, dk, dv, kv_head, key0 + warp * MI * 16, keys, part * PD);
}

template <class C>
int start(const Backward& b, void* stream) {
  const Problem& p = b.p;
  const int low = p.window > 0 ? (p.start - p.window + 1 > 0 ? p.start - p.window + 1 : 0) : 0;
  const int base = low / C::BN * C::BN;  // tiles of one grid, whatever the chunk
  const int64_t tiles = (static_cast<int64_t>(p.start) + p.n - base + C::BN - 1) / C::BN;
  if (const int error = allow_shared_memory(reinterpret_cast<const void*>(kv_kernel<C>), C::SMEM)) return error;
  kv_kernel<C><<<static_cast<unsigned>(tiles * C::PARTS * p.kv_heads), C::THREADS, C::SMEM, static_cast<cudaStream_t>(stream)>>>(b, base);
  return cudaGetLastError();
}

}  // namespace

int backward_kv(const Backward& b, void* stream) {
  if (b.p.dim <= 32) return start<Config<32, 2, 4, 64, 2>>(b, stream);
  // Twice the keys halve the traffic of q and dout, but a window would cut more of such a tile.
  if (b.p.dim <= 64 && b.p.window == 0 && b.p.start + b.p.n >= 4096) return start<Config<64, 2, 8, 64, 1, 32>>(b, stream);
  if (b.p.dim <= 64) return start<Config<64, 2, 4, 64, 2, 32>>(b, stream);
  if (b.p.dim <= 96) return start<Config<96, 1, 4, 64, 1>>(b, stream);
  if (b.p.dim <= 128) return start<Config<128, 1, 4, 64, 1>>(b, stream);
  if (b.p.dim <= 192) return start<Config<192, 1, 4, 32, 1, 32, 2>>(b, stream);
  return start<Config<256, 1, 4, 16, 1, 16, 2>>(b, stream);
}

}  // namespace attention::cuda
