/* Attention's backward for Hopper (sm_90a) behind a window of at most 129 keys, at head dims up to 64: Q, K, V, O and dO are read once, dQ, dK and dV written once. The algorithm is
 * FlashAttention-2's (Dao 2023); the order of work is ours.
 *
 * A block owns a span of keys of one K/V head and goes over the queries that see them in rising order, 64 rows at a time (row = query * group + head, as in tiles.cuh: 8 queries of 8
 * heads cut little of a window). Such a tile sees keys of three neighbouring blocks of 64. Each belongs to one of three warpgroups, which keeps its dK and dV in registers for as long as
 * queries see it, adds them to memory, and goes on with the third block further: one's keys have just begun to be seen, one's are in the middle, one's end. Scores are transposed (keys are
 * rows), so that P is a left operand in registers; dS goes through shared memory, for dK and dQ.
 *
 * The fourth warpgroup makes dQ of a tile from the dS of all three, complete, and writes it as bf16. Before that it reads dO and O of the next tile for delta = rowsum(dO O), with which it
 * also sums dSinks. One of its threads starts the copies. At both ends of a span the scores of window - 1 queries are computed twice: before its own keys for dQ, behind them for dK
 * and dV. Every sum has one order whatever the spans, except that of dSinks. */
#ifndef LC_ATTENTION_HOPPER_BACKWARD_WINDOW_CUH
#define LC_ATTENTION_HOPPER_BACKWARD_WINDOW_CUH
#include "lctx/hopper.cuh"
#include "tiles.cuh"

namespace attention::cuda {

struct HopperWindow {
  CUtensorMap q, dout, out, k, v;
  Problem p; /* its window: at most 129, never 0 */
  bf16* dq;
  float *dk, *dv;
  int64_t dq_stride, dk_stride, dv_stride;
  const float* lse;
  float* sink_parts; /* [spans, heads], or null */
  int32_t first_block, end_block; /* blocks of 64 keys that any query sees */
  int32_t span;                   /* blocks of keys of one block of threads */
  int32_t shift;                  /* log2 of the queries of a tile, at most 64; tiles begin at multiples of them, counted as keys are */
};

/* STAGES: tiles of Q, dO and O on their way; SLOTS: blocks of K and V, three in use. REGISTERS: of a thread of the first three warpgroups. */
template <int STAGES_, int REGISTERS_>
struct HopperWindowConfig {
  static constexpr int M = 64, N = 64, HD = 64, WGS = 3, SLOTS = 4, THREADS = 512, STAGES = STAGES_, REGISTERS = REGISTERS_, LAST_REGISTERS = 512 - 3 * REGISTERS_;
  static constexpr int TILE = M * HD * 2, DS = WGS * M * N * 2; /* bytes */
  static constexpr int AT_K = 0, AT_V = SLOTS * TILE, AT_ROWS = 2 * SLOTS * TILE, ROWS = 3 * TILE /* Q, dO, O */, AT_DS = AT_ROWS + STAGES * ROWS, AT_INFO = AT_DS + 2 * DS, INFO = M * 16,
                       AT_SINK = AT_INFO + STAGES * INFO, AT_BAR = AT_SINK + M * 4, BARRIERS = 3 * STAGES + 2 * SLOTS + 4, SMEM = AT_BAR + BARRIERS * 8;
  static_assert(STAGES >= 3 && SMEM <= 227 << 10, "copies lead by two tiles; a block has 227 KiB");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace windowed {
__device__ __forceinline__ int2 load_ints(uint32_t address) {
  int2 v;
  asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint4 load_chunk(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ int load_int(uint32_t address) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
template <class T>
__device__ __forceinline__ void store_word(uint32_t address, T x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(*reinterpret_cast<uint32_t*>(&x)) : "memory");
}
/* Adds without waiting for what is there. Nothing else adds to these elements during this pass, so no order is left to chance. */
__device__ __forceinline__ void add_pair(float* to, float a, float b) { asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b) : "memory"); }
}  // namespace windowed
#endif

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) hopper_window_kernel(const __grid_constant__ HopperWindow a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace lctx::hopper;
  using namespace windowed;
  constexpr int HD = C::HD, STAGES = C::STAGES, SLOTS = C::SLOTS, TILE = C::TILE;
  extern __shared__ __align__(1024) unsigned char memory[];
  const Problem& p = a.p;
  const uint32_t base = smem(memory), sk = base + C::AT_K, sv = base + C::AT_V, rows = base + C::AT_ROWS, sds = base + C::AT_DS, info = base + C::AT_INFO, bars = base + C::AT_BAR;
  // Arrived: tiles of rows; their lse, delta and keys seen; tiles done with; blocks of keys; done with; dS of a tile; done with.
  const uint32_t full = bars, ready = full + 8 * STAGES, empty = ready + 8 * STAGES, kv_full = empty + 8 * STAGES, kv_empty = kv_full + 8 * SLOTS, ds_full = kv_empty + 8 * SLOTS,
                 ds_empty = ds_full + 16;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int queries = 1 << a.shift;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) mbarrier_init(full + 8 * s, 1), mbarrier_init(ready + 8 * s, 4), mbarrier_init(empty + 8 * s, 12);
    for (int s = 0; s < SLOTS; s++) mbarrier_init(kv_full + 8 * s, 1), mbarrier_init(kv_empty + 8 * s, 8);
    for (int s = 0; s < 2; s++) mbarrier_init(ds_full + 8 * s, 12), mbarrier_init(ds_empty + 8 * s, 4);
    mbarrier_init_fence();
  }
  if (queries * p.group < C::M) {  // rows that no copy writes: a NaN there would survive a probability of 0
    const int from = queries * p.group * 8, chunks = C::M * 8 - from;
    for (int x = threadIdx.x; x < STAGES * 3 * chunks; x += C::THREADS)
      *reinterpret_cast<uint4*>(memory + C::AT_ROWS + x / chunks * TILE + (from + x % chunks) * 16) = make_uint4(0, 0, 0, 0);
    fence_async();
  }
  __syncthreads();

  const int kv_head = static_cast<int>(blockIdx.x) % p.kv_heads, part = static_cast<int>(blockIdx.x) / p.kv_heads;
  const int begin = a.first_block + part * a.span, end = min(begin + a.span, a.end_block);  // own blocks of keys
  const int to_block = 6 - a.shift;
  const int tile_begin = max(begin * 64, p.start) >> a.shift,
            tile_end = static_cast<int>(min(static_cast<int64_t>(end) * 64 + p.window - 2, static_cast<int64_t>(p.start) + p.n - 1) >> a.shift) + 1;
  const int first = (tile_begin >> to_block) - 2;  // block of keys; what lies before key 0 reads as zeros

  if (warp >= 12) {
    registers_down<C::LAST_REGISTERS>();
    const int thread = threadIdx.x % 128;
    const auto load_rows = [&](int tile, int stage) {
      const uint32_t to = rows + stage * C::ROWS, bar = full + 8 * stage;
      const int query = (tile << a.shift) - p.start, head = kv_head * p.group;
      mbarrier_expect(bar, 3 * queries * p.group * 128);
      tma_load(to, &a.q, bar, 0, head, query);
      tma_load(to + TILE, &a.dout, bar, 0, head, query);
      tma_load(to + 2 * TILE, &a.out, bar, 0, head, query);
    };
    const auto load_keys = [&](int block) {
      const int slot = (block - first) % SLOTS;
      mbarrier_expect(kv_full + 8 * slot, 2 * TILE);
      tma_load(sk + slot * TILE, &a.k, kv_full + 8 * slot, 0, kv_head, block * 64);
      tma_load(sv + slot * TILE, &a.v, kv_full + 8 * slot, 0, kv_head, block * 64);
    };
    if (thread == 0) {
      for (int x = 0; x < SLOTS && first + x < end; x++) {
        load_keys(first + x);
        if (x < STAGES && tile_begin + x < tile_end) load_rows(tile_begin + x, x);
      }
      for (int x = min(SLOTS, end - first); x < STAGES && tile_begin + x < tile_end; x++) load_rows(tile_begin + x, x);
    }
    __syncwarp();

    // Two threads a row: lse, the first key seen, delta.
    const int row = thread / 2, half = thread & 1, local = query_of(p, row), head = kv_head * p.group + row - local * p.group;
    const bool exists = local < queries;
    const float sink = a.sink_parts != nullptr && exists ? p.sinks[head] * kLog2e : 0;
    float sink_sum = 0, next_lse;
    int next_low;
    const auto fetch = [&](int tile) {
      const int query = (tile << a.shift) + local - p.start;
      next_lse = INFINITY, next_low = 0;  // P is 0 in rows that do not exist
      if (exists && tile < tile_end && query >= 0 && query < p.n) {
        next_lse = a.lse[static_cast<int64_t>(query) * p.heads + head] * kLog2e;
        next_low = first_key(p, query);
      }
    };
    int prepared = tile_begin, stage = 0;
    uint32_t phase = 0;
    const auto prepare = [&] {
      const float lse = next_lse;
      const int low = next_low, tile = prepared++;
      fetch(tile + 1);
      mbarrier_wait(full + 8 * stage, phase);
      const uint32_t at = rows + stage * C::ROWS + TILE + row * 128;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t chunk = ((half * 4 + i) ^ (row & 7)) << 4;
        const uint4 u = load_chunk(at + chunk), w = load_chunk(at + TILE + chunk);
        const uint32_t x[4] = {u.x, u.y, u.z, u.w}, y[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          sum = fmaf(__uint_as_float(x[j] << 16), __uint_as_float(y[j] << 16), sum);
          sum = fmaf(__uint_as_float(x[j] & 0xffff0000u), __uint_as_float(y[j] & 0xffff0000u), sum);
        }
      }
      const float delta = sum + __shfl_xor_sync(~0u, sum, 1);
      const uint32_t to = info + stage * C::INFO + row * 4;
      if (half == 0) {
        store_word(to, lse), store_word(to + 256, delta);
        if (a.sink_parts != nullptr && tile >> to_block < end && lse != INFINITY) sink_sum = fmaf(exp2f(sink - lse), delta, sink_sum);
      } else {
        store_word(to + 512, low), store_word(to + 768, (tile << a.shift) + local);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ready + 8 * stage);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    };
    fetch(tile_begin);
    prepare();

    float dq[HD / 2];
    int before = first - 1;  // blocks of keys up to this one have been waited for
    int own = tile_begin >> to_block, t = 0, freed = 0;
    uint32_t freed_phase = 0;
#pragma unroll 1
    for (int tile = tile_begin; tile < tile_end; tile++, t++) {
      if (tile >> to_block != own) {
        if (lane == 0) mbarrier_arrive(kv_empty + 8 * ((own - 2 - first) % SLOTS));
        own++;
      }
      if (prepared < tile_end) prepare();
      mbarrier_wait(ds_full + 8 * (t & 1), t >> 1 & 1);
      if (thread == 0) {
        if (t > 0) {  // all are past the tile before
          if (tile - 1 + STAGES < tile_end) {
            mbarrier_wait(empty + 8 * freed, freed_phase);
            load_rows(tile - 1 + STAGES, freed);
          }
          if (++freed == STAGES) freed = 0, freed_phase ^= 1;
        }
        const int ahead = own + 1 - first;
        if ((tile & ((1 << to_block) - 1)) == 0 && ahead >= SLOTS && own + 1 < end) {
          mbarrier_wait(kv_empty + 8 * (ahead % SLOTS), (ahead / SLOTS - 1) & 1);
          load_keys(own + 1);
        }
      }
      __syncwarp();
      while (before < min(own, end - 1)) {
        before++;
        mbarrier_wait(kv_full + 8 * ((before - first) % SLOTS), (before - first) / SLOTS & 1);
      }
      hold(dq);
      wgmma_fence();
#pragma unroll
      for (int y = 0; y < 3; y++) {
        const int x = own - 2 + y - first;
        const uint64_t left = descriptor(sds + (t & 1) * C::DS + x % 3 * TILE), right = descriptor(sk + x % SLOTS * TILE);
#pragma unroll
        for (int kk = 0; kk < 4; kk++) Wgmma<HD>::template ss<0, 1>(dq, left + kk * 2, right + kk * 128, y + kk > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      hold(dq);
      if (lane == 0) mbarrier_arrive(ds_empty + 8 * (t & 1));
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = warp % 4 * 16 + h * 8 + lane / 4, of = query_of(p, r), query = (tile << a.shift) + of - p.start;
        const bool write = own < end && of < queries && query >= 0 && query < p.n;
        bf16* to = a.dq + query * a.dq_stride + static_cast<int64_t>(kv_head * p.group + r - of * p.group) * p.dim;
        store_row<HD>(write ? to : nullptr, *reinterpret_cast<const float(*)[HD / 8][4]>(&dq), h, p.scale, p.dim);
      }
    }
    if (a.sink_parts != nullptr) {
      if (half == 0) store_word(base + C::AT_SINK + row * 4, sink_sum);
      bar_sync(1, 128);
      if (thread < p.group) {
        float sum = 0;
        for (int q = 0; q < queries; q++) sum += reinterpret_cast<const float*>(memory + C::AT_SINK)[q * p.group + thread];
        a.sink_parts[static_cast<int64_t>(part) * p.heads + kv_head * p.group + thread] = sum;
      }
    }
    return;
  }

  registers_up<C::REGISTERS>();
  const int w = warp / 4, column = lane % 4 * 2, key_lane = warp % 4 * 16 + lane / 4;
  const float c = p.scale * kLog2e;
  float dk[HD / 2], dv[HD / 2], s[32], d[16];  // s: scores, then P; d: dP of half of the queries
  uint32_t pr[4][4] = {};
  // stmatrix: lane l gives row l % 8 of 8 x 8 block l / 8; blocks: keys + 0, keys + 8, then 8 queries further.
  const uint32_t ds_at = sds + w * TILE + (lane / 16 * 8 + (lane & 7)) * 128 + (((warp % 4 * 2 + (lane / 8 & 1)) ^ (lane & 7)) << 4);
  int block = first + w, add = 0;  // add: dk and dv hold something
  const auto scores = [&](uint32_t keys, uint32_t tile) {
    const uint64_t left = descriptor(keys), right = descriptor(tile);
#pragma unroll
    for (int kk = 0; kk < 4; kk++) Wgmma<64>::ss<0, 0>(s, left + kk * 2, right + kk * 2, kk > 0);
    wgmma_commit();
  };
  // dP^T of half of a tile's queries: dS is made from P in f32, beside which registers for all of dP^T are wanting.
  const auto start_half = [&](uint32_t values, uint32_t dout) {
    const uint64_t left = descriptor(values), right = descriptor(dout);
    hold(d);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) Wgmma<32>::ss<0, 0>(d, left + kk * 2, right + kk * 2, kk > 0);
    wgmma_commit();
  };
  // S^T of a tile: issued a step ahead, beside dV and dK of the tile before. Its keys may be the block after the present one.
  const auto start_scores = [&](int tile) {
    const int own = tile >> to_block, t = tile - tile_begin, x = (block < own - 2 ? block + 3 : block) - first;
    if (x + first < end) mbarrier_wait(kv_full + 8 * (x % SLOTS), x / SLOTS & 1);
    mbarrier_wait(full + 8 * (t % STAGES), t / STAGES & 1);
    hold(s);
    wgmma_fence();
    scores(sk + x % SLOTS * TILE, rows + t % STAGES * C::ROWS);
  };
  const auto flush = [&] {
    const int keys = p.start + p.n;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int key = block * 64 + key_lane + h * 8;
      if (key >= keys) continue;
      float* to_k = a.dk + key * a.dk_stride + static_cast<int64_t>(kv_head) * p.dim + column;
      float* to_v = a.dv + key * a.dv_stride + static_cast<int64_t>(kv_head) * p.dim + column;
#pragma unroll
      for (int j = 0; j < HD / 8; j++)
        if (j * 8 < p.dim) {
          add_pair(to_k + j * 8, dk[j * 4 + h * 2] * p.scale, dk[j * 4 + h * 2 + 1] * p.scale);
          add_pair(to_v + j * 8, dv[j * 4 + h * 2], dv[j * 4 + h * 2 + 1]);
        }
    }
  };

  hold(dk), hold(dv), hold(s);
  start_scores(tile_begin);
#pragma unroll 1
  for (int tile = tile_begin; tile < tile_end; tile++) {
    const int own = tile >> to_block, t = tile - tile_begin, stage = t % STAGES, phase = t / STAGES & 1;
    const uint32_t q = rows + stage * C::ROWS, row_info = info + stage * C::INFO, ds = (t & 1) * C::DS;
    wgmma_wait<0>();  // S of this tile, dV and dK of the one before
    hold(s), hold(dk), hold(dv);
#pragma unroll
    for (int kk = 0; kk < 4; kk++) hold(pr[kk]);
    if (lane == 0 && t > 0) mbarrier_arrive(empty + 8 * ((t - 1) % STAGES));
    if (block < own - 2) {
      if (add && block >= begin) flush();
      if (lane == 0 && block < end) mbarrier_arrive(kv_empty + 8 * ((block - first) % SLOTS));
      block += 3, add = 0;
    }
    // A warpgroup whose keys are not seen yet goes along with probabilities of 0 and keeps nothing: products in a branch would be serialised.
    const bool active = block <= own && block < end;
    const int low = block * 64 + warp % 4 * 16, high = low + 15, first_pos = tile << a.shift, last_pos = first_pos + queries - 1;
    const bool seen = active && block >= 0 && low <= last_pos && high >= first_pos - p.window + 1;  // any of this warp's keys, by any row
    const uint32_t values = sv + (block - first) % SLOTS * TILE;
    start_half(values, q + TILE);  // beside the exponentials
    mbarrier_wait(ready + 8 * stage, phase);
    if (seen) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 lse = load_shared(row_info + column * 4 + j * 32);
#pragma unroll
        for (int e = 0; e < 4; e++) s[j * 4 + e] = exp2_fast(fmaf(s[j * 4 + e], c, -(e % 2 ? lse.y : lse.x)));
      }
      const int last_query = min(last_pos, p.start + p.n - 1) - first_pos;
      if (high > first_pos || low < last_pos - p.window + 1 || (p.doc_start != nullptr && load_int(row_info + 512 + last_query * p.group * 4) > low)) {
        const int key = block * 64 + key_lane;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const int2 from = load_ints(row_info + 512 + column * 4 + j * 32), to = load_ints(row_info + 768 + column * 4 + j * 32);
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int lo = e ? from.y : from.x, hi = e ? to.y : to.x;
            if (key < lo || key > hi) s[j * 4 + e] = 0;
            if (key + 8 < lo || key + 8 > hi) s[j * 4 + 2 + e] = 0;
          }
        }
      }
    }
    mbarrier_wait(ds_empty + 8 * (t & 1), (t >> 1 & 1) ^ 1);
    // dS^T = P^T (dP^T - delta), and P^T as dV's operand
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      if (kk == 2) start_half(values, q + TILE + 32 * 128);
      if (kk % 2 == 0) {
        wgmma_wait<0>();
        hold(d);
      }
      uint32_t dr[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = kk * 8 + i * 2;
        const float2 delta = load_shared(row_info + 256 + column * 4 + at / 4 * 32);
        dr[i] = seen ? pack(s[at] * (d[at % 16] - delta.x), s[at + 1] * (d[at % 16 + 1] - delta.y)) : 0;
        pr[kk][i] = seen ? pack(s[at], s[at + 1]) : 0;
      }
      stmatrix_trans(ds_at + ds + kk * 2048, dr);
      hold(pr[kk]);
    }
    fence_async();
    bar_sync(2 + w, 128);
    if (lane == 0) mbarrier_arrive(ds_full + 8 * (t & 1));
    hold(dk), hold(dv);
    wgmma_fence();
    const uint64_t dout = descriptor(q + TILE), left = descriptor(sds + ds + w * TILE), right = descriptor(q);
#pragma unroll
    for (int kk = 0; kk < 4; kk++) Wgmma<HD>::template rs<1>(dv, pr[kk], dout + kk * 128, kk > 0 ? 1 : add);
#pragma unroll
    for (int kk = 0; kk < 4; kk++) Wgmma<HD>::template ss<1, 1>(dk, left + kk * 128, right + kk * 128, kk > 0 ? 1 : add);
    wgmma_commit();
    add = active;
    start_scores(min(tile + 1, tile_end - 1));  // after the last tile once more, unused: a branch would be serialised
  }
  wgmma_wait<0>();
  hold(s), hold(dk), hold(dv);
  if (add && block >= begin) flush();
#endif
}

}  // namespace attention::cuda
#endif
