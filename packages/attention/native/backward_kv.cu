/* dK and dV. A block owns BN keys of one K/V head and walks over the rows (queries x heads of the group) that see them, in order, so that every sum has one
 * order. Scores are computed transposed, keys as rows: the probabilities and their gradients are then already laid out as the left operands of
 * dV += P^T dO and dK += dS^T Q, and never leave registers. */
#include "tiles.cuh"

namespace attention::cuda {
namespace {

template <int HD_, int MI_, int WARPS_, int BM_, int CTAS_, bool ROUNDED_, int PARTS_ = 1>
struct Config {
  static constexpr int HD = HD_, MI = MI_, WARPS = WARPS_, BM = BM_, CTAS = CTAS_, THREADS = WARPS * 32, BN = MI * 16 * WARPS;
  static constexpr bool ROUNDED = ROUNDED_;  // dS from P as it was rounded for dV, which takes half the registers
  // A block sums one of PARTS parts of the head dims: dK and dV of wide heads are more than the registers hold. Scores are then computed PARTS times.
  static constexpr int PARTS = PARTS_, PD = HD / PARTS;
  static constexpr int KEYS = BN * HD * 2, TILE = BM * HD * 2, SMEM = 2 * KEYS + 4 * TILE + 2 * BM * 16;
  static_assert(BM <= THREADS, "one thread per row");
  static_assert(SMEM <= kSharedEverywhere, "shared memory");
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::CTAS) kv_kernel(const __grid_constant__ Backward b, int key_base) {
  constexpr int HD = C::HD, PD = C::PD, MI = C::MI, BN = C::BN, BM = C::BM, THREADS = C::THREADS, KK = HD / 16;
  extern __shared__ __align__(128) unsigned char smem[];
  const Problem& p = b.p;
  const int kv_head = static_cast<int>(blockIdx.x) % p.kv_heads, group = p.group;
  const int work = static_cast<int>(blockIdx.x) / p.kv_heads, part = C::PARTS == 1 ? 0 : work % C::PARTS;
  const int key0 = key_base + work / C::PARTS * BN, keys = p.start + p.n;
  const int last_key = min(key0 + BN, keys) - 1;
  // Queries that see any of the keys.
  const int begin = max(0, key0 - p.start);
  int end = p.n;
  if (p.window > 0) end = static_cast<int>(min(static_cast<int64_t>(end), static_cast<int64_t>(last_key) + p.window - p.start));
  if (p.doc_start) {  // non-decreasing: up to the first document that begins after the keys
    int low = begin, high = max(end, begin);
    while (low < high) {
      const int middle = (low + high) / 2;
      if (p.doc_start[middle] > last_key) high = middle;
      else low = middle + 1;
    }
    end = low;
  }
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
    constexpr int CHUNKS = HD / 8, TOTAL = BM * CHUNKS;
#pragma unroll
    for (int x0 = 0; x0 < TOTAL; x0 += THREADS) {
      const int x = x0 + threadIdx.x;
      if (TOTAL % THREADS != 0 && x >= TOTAL) break;
      const int r = x / CHUNKS, chunk = x % CHUNKS, row = row0 + r;
      const bool valid = row < row_end && chunk * 8 < p.dim;
      const int query = query_of(p, row), column = (row - query * group) * p.dim + chunk * 8;
      cp_async(sq + stage * C::TILE + Rows<HD>::at(r, chunk), valid ? q + query * p.q_stride + column : p.q, valid);
      cp_async(sdo + stage * C::TILE + Rows<HD>::at(r, chunk), valid ? dout + query * b.dout_stride + column : b.dout, valid);
    }
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

    // P^T = exp(scale K Q^T - lse)
    float s[MI][BM / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < KK; kk++) {
      uint32_t a[MI][4];
#pragma unroll
      for (int i = 0; i < MI; i++) ldmatrix(a[i], fa.get(sk, i, kk));
#pragma unroll
      for (int j = 0; j < BM / 16; j++) {
        uint32_t f[4];
        ldmatrix(f, fb.get(tq, j, kk));
#pragma unroll
        for (int i = 0; i < MI; i++) {
          mma(s[i][j * 2], a[i], f[0], f[1]);
          mma(s[i][j * 2 + 1], a[i], f[2], f[3]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < BM / 8; j++) {
      const float2 lse = *reinterpret_cast<const float2*>(row_lse + column + j * 8);
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[i][j][e] = exp2_fast(fmaf(s[i][j][e], c, -(e % 2 ? lse.y : lse.x)));
    }
    if (masked) {
#pragma unroll
      for (int j = 0; j < BM / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int2 see = row_keys[column + j * 8 + e % 2];
#pragma unroll
          for (int i = 0; i < MI; i++) {
            const int key = key0 + warp * MI * 16 + i * 16 + e / 2 * 8 + lane / 4;
            if (key < see.x || key > see.y) s[i][j][e] = 0;
          }
        }
    }

    // dV += P^T dO
    uint32_t pp[BM / 16][MI][4];
#pragma unroll
    for (int kk = 0; kk < BM / 16; kk++) {
#pragma unroll
      for (int i = 0; i < MI; i++) {
        pp[kk][i][0] = pack(s[i][kk * 2][0], s[i][kk * 2][1]);
        pp[kk][i][1] = pack(s[i][kk * 2][2], s[i][kk * 2][3]);
        pp[kk][i][2] = pack(s[i][kk * 2 + 1][0], s[i][kk * 2 + 1][1]);
        pp[kk][i][3] = pack(s[i][kk * 2 + 1][2], s[i][kk * 2 + 1][3]);
      }
#pragma unroll
      for (int j = 0; j < PD / 16; j++) {
        uint32_t f[4];
        ldmatrix_trans(f, ft.get(tdo, kk, part * (PD / 16) + j));
#pragma unroll
        for (int i = 0; i < MI; i++) {
          mma(dv[i][j * 2], pp[kk][i], f[0], f[1]);
          mma(dv[i][j * 2 + 1], pp[kk][i], f[2], f[3]);
        }
      }
    }

    // dS^T = P^T (V dO^T - delta)
    float d[MI][BM / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < KK; kk++) {
      uint32_t a[MI][4];
#pragma unroll
      for (int i = 0; i < MI; i++) ldmatrix(a[i], fa.get(sv, i, kk));
#pragma unroll
      for (int j = 0; j < BM / 16; j++) {
        uint32_t f[4];
        ldmatrix(f, fb.get(tdo, j, kk));
#pragma unroll
        for (int i = 0; i < MI; i++) {
          mma(d[i][j * 2], a[i], f[0], f[1]);
          mma(d[i][j * 2 + 1], a[i], f[2], f[3]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < BM / 8; j++) {
      const float2 delta = *reinterpret_cast<const float2*>(row_delta + column + j * 8);
#pragma unroll
      for (int i = 0; i < MI; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const uint32_t pair = pp[j / 2][i][j % 2 * 2 + e / 2];
          const float prob = __uint_as_float(e % 2 ? pair & 0xffff0000u : pair << 16);
          d[i][j][e] = (C::ROUNDED ? prob : s[i][j][e]) * (d[i][j][e] - (e % 2 ? delta.y : delta.x));
        }
    }
    // dK += dS^T Q
#pragma unroll
    for (int kk = 0; kk < BM / 16; kk++) {
      uint32_t a[MI][4];
#pragma unroll
      for (int i = 0; i < MI; i++) {
        a[i][0] = pack(d[i][kk * 2][0], d[i][kk * 2][1]);
        a[i][1] = pack(d[i][kk * 2][2], d[i][kk * 2][3]);
        a[i][2] = pack(d[i][kk * 2 + 1][0], d[i][kk * 2 + 1][1]);
        a[i][3] = pack(d[i][kk * 2 + 1][2], d[i][kk * 2 + 1][3]);
      }
#pragma unroll
      for (int j = 0; j < PD / 16; j++) {
        uint32_t f[4];
        ldmatrix_trans(f, ft.get(tq, kk, part * (PD / 16) + j));
#pragma unroll
        for (int i = 0; i < MI; i++) {
          mma(dk[i][j * 2], a[i], f[0], f[1]);
          mma(dk[i][j * 2 + 1], a[i], f[2], f[3]);
        }
      }
    }
    if (more) keep(stage ^ 1, next);
  }

#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int key = key0 + warp * MI * 16 + i * 16 + h * 8 + lane / 4;
      if (key >= keys) continue;
      float* to_k = b.dk + key * b.dk_stride + static_cast<int64_t>(kv_head) * p.dim;
      float* to_v = b.dv + key * b.dv_stride + static_cast<int64_t>(kv_head) * p.dim;
#pragma unroll
      for (int j = 0; j < PD / 8; j++) {
        const int column = part * PD + j * 8 + lane % 4 * 2;
        if (column >= p.dim) continue;
        float2* at_k = reinterpret_cast<float2*>(to_k + column);
        float2* at_v = reinterpret_cast<float2*>(to_v + column);
        const float2 before_k = *at_k, before_v = *at_v;
        *at_k = make_float2(before_k.x + dk[i][j][h * 2] * p.scale, before_k.y + dk[i][j][h * 2 + 1] * p.scale);
        *at_v = make_float2(before_v.x + dv[i][j][h * 2], before_v.y + dv[i][j][h * 2 + 1]);
      }
    }
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
  if (b.p.dim <= 32) return start<Config<32, 2, 4, 64, 2, true>>(b, stream);
  // Twice the keys halve the traffic of q and dout, but a window would cut more of such a tile.
  if (b.p.dim <= 64 && b.p.window == 0 && b.p.start + b.p.n >= 4096) return start<Config<64, 2, 8, 64, 1, true>>(b, stream);
  if (b.p.dim <= 64) return start<Config<64, 2, 4, 64, 2, true>>(b, stream);
  if (b.p.dim <= 96) return start<Config<96, 1, 4, 64, 1, true>>(b, stream);
  if (b.p.dim <= 128) return start<Config<128, 1, 4, 64, 1, true>>(b, stream);
  if (b.p.dim <= 192) return start<Config<192, 1, 4, 32, 1, true, 2>>(b, stream);
  return start<Config<256, 1, 4, 16, 1, true, 2>>(b, stream);
}

}  // namespace attention::cuda
