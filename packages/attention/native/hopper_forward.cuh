/* Attention's forward for Hopper (sm_90a), after FlashAttention-3 (Shah et al. 2024): a warpgroup of producers keeps a ring of K and V tiles filled by bulk tensor copies, and
 * WGS warpgroups of 64 rows each (row = query * group + head, as in tiles.cuh) multiply with wgmma, the scores of the next tile under way while this tile's softmax runs.
 * A block works through items (a tile of queries of one K/V head), dearest first.
 *
 * Blocks share keys through the L2 cache, as long as they read them at about the same time. By themselves they drift apart by some 1% of the way, until each has every tile of keys from DRAM;
 * that is fast enough, but its power lowers the clock by a seventh. So the blocks work on as few K/V heads at a time as divides them evenly (`run`), and their producers keep pace (`Pace`).
 *
 * Key tiles are laid from the last visible key of an item backwards, so that one tile holds the diagonal; only tiles at the diagonal, a window's edge or a document's are masked.
 *
 * FAST: softmax needs some reference near the row's maximum, not the maximum itself. A row takes the maximum over its first keys (kExactKeys) and keeps it: later tiles need no maximum and
 * no rescaling. But a running maximum makes the largest P exactly 1 where another reference has it rounded to bf16, which shows where few keys carry a row: a tile that weighs more than
 * 1 / kOutweighs of all before it still makes its largest P the reference. A row whose sum passes 2^60 might have overflowed: its LSE is written as infinity, and a second launch (not
 * FAST, `flagged`) computes the items of such rows with a running maximum. */
#ifndef LC_ATTENTION_HOPPER_FORWARD_CUH
#define LC_ATTENTION_HOPPER_FORWARD_CUH
#include "lctx/hopper.cuh"
#include "tiles.cuh"

namespace attention::cuda {

struct HopperForward {
  Forward f;
  int32_t queries; /* of an item: as many as fit into its rows with all heads of the group */
  int32_t tiles;   /* items of one K/V head */
  int32_t run;     /* items that one K/V head has in a row, before the next head */
  unsigned long long* pace; /* how often blocks have arrived at a milestone, 0 at first; null: each block at its own pace */
  bool flagged;    /* only items with an LSE that is not finite */
  CUtensorMap q, k, v;
};

constexpr int kMaxFlags = 1024; /* items of one block in the second launch */
constexpr int kExactKeys = 1024; /* from an item's last key backwards: the reference is the maximum */
constexpr int kPaceTiles = 32; /* tiles of keys between two milestones */
constexpr long long kPacePatience = 1 << 21; /* clocks, about 1 ms */
constexpr float kOutweighs = 4;  /* later a tile moves it whose sum is more than 1 / kOutweighs of all before */

template <int HD_, int WGS_, int BN_, int STAGES_, int QS_, bool FAST_, bool PINGPONG_, bool BESIDE_>
struct HopperConfig {
  static constexpr int HD = HD_, WGS = WGS_, BN = BN_, STAGES = STAGES_, QS = QS_;
  static constexpr bool FAST = FAST_, PINGPONG = PINGPONG_;
  static constexpr bool BESIDE = BESIDE_; /* exponentials run beside the same warpgroup's output product, not only beside the next scores and the other warpgroups */
  static constexpr int BM = WGS * 64, THREADS = (WGS + 1) * 128;
  static constexpr int BLOCKS = HD / 64; /* of 64 columns: what a swizzled row holds */
  static constexpr int REGISTERS = WGS == 2 ? 240 : 160, PRODUCER_REGISTERS = 24;
  static constexpr int Q_BYTES = BM * HD * 2, TILE = BN * HD * 2, BARRIERS = 8 * (2 * QS + 4 * STAGES);
  static constexpr int SMEM = 1024 + QS * Q_BYTES + STAGES * 2 * TILE + BARRIERS + (FAST ? 0 : kMaxFlags);
  static_assert(SMEM <= 227 << 10, "more shared memory than a block has");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* A place in a ring of stages, and how often it has been passed, mod 2. */
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};
/* No block is further than two milestones ahead of the average. Where others do not run at all (another kernel holds their multiprocessors), waiting ends, for all blocks and for good. */
struct Pace {
  static constexpr unsigned long long FREE = 1ull << 40; /* more than all arrivals */
  unsigned long long* arrivals;
  unsigned long long due = 0; /* arrivals to wait for */
  int tiles = 0;
  __device__ __forceinline__ explicit Pace(unsigned long long* a) : arrivals(a) {}
  __device__ __forceinline__ void step() {
    if (!arrivals || ++tiles < kPaceTiles) return;
    tiles = 0;
    atomicAdd(arrivals, 1);
    for (const long long since = clock64();; __nanosleep(100)) {
      unsigned long long seen;
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(arrivals) : "memory");
      if (seen >= due) break;
      if (clock64() - since > kPacePatience) return leave();
    }
    due += gridDim.x;
  }
  __device__ __forceinline__ void leave() {
    if (arrivals) atomicAdd(arrivals, FREE);
    arrivals = nullptr;
  }
};
#endif

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) hopper_forward_kernel(const __grid_constant__ HopperForward a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace lctx::hopper;
  constexpr int HD = C::HD, BN = C::BN, BM = C::BM, STAGES = C::STAGES, QS = C::QS, WGS = C::WGS, BLOCKS = C::BLOCKS;
  extern __shared__ unsigned char raw[];
  const Problem& p = a.f.p;
  const uint32_t sq = (smem(raw) + 1023) & ~1023u, sk = sq + QS * C::Q_BYTES, sv = sk + STAGES * C::TILE;
  const uint32_t q_full = sv + STAGES * C::TILE, q_empty = q_full + 8 * QS, k_full = q_empty + 8 * QS, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES,
                 v_empty = v_full + 8 * STAGES;
  unsigned char* flags = raw + (q_full + C::BARRIERS - smem(raw));
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);  // uniform, and the compiler knows it
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);

  if (threadIdx.x == 0) {
    for (int s = 0; s < QS; s++) mbarrier_init(q_full + 8 * s, 1), mbarrier_init(q_empty + 8 * s, WGS * 4);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(k_full + 8 * s, 1), mbarrier_init(v_full + 8 * s, 1);
      mbarrier_init(k_empty + 8 * s, WGS * 4), mbarrier_init(v_empty + 8 * s, WGS * 4);
    }
    mbarrier_init_fence();
  }
  if (!C::FAST && a.flagged) {  // this block's tiles: block, block + blocks, ...
    const int own = a.tiles > block ? (a.tiles - 1 - block) / blocks + 1 : 0;
    for (int i = threadIdx.x; i < own * p.kv_heads; i += C::THREADS) flags[i] = 0;
    __syncthreads();
    bool any = false;
    for (int k = 0; k < own; k++) {
      const int64_t query0 = static_cast<int64_t>(block + k * blocks) * a.queries;
      const int count = min(a.queries, static_cast<int>(p.n - query0)) * p.heads;
#pragma unroll 4
      for (int x = threadIdx.x; x < count; x += C::THREADS)
        if (!(fabsf(a.f.lse[query0 * p.heads + x]) < INFINITY)) flags[k * p.kv_heads + x % p.heads / p.group] = 1, any = true;
    }
    if (!__syncthreads_or(any)) return;
  }
  __syncthreads();

  struct Item {
    int kv_head, query0, last, begin, count;
    int end;  // one past the last visible key
  };
  /* The block's item number i; false: there is none. Rounds of the grid go to and fro, so that no block has the dearest of every round. */
  auto item_of = [&](int i, Item& t) {
    int tile;
    if (!C::FAST && a.flagged) {
      const int k = i / p.kv_heads;
      tile = block + k * blocks;
      if (tile >= a.tiles) return false;
      t.kv_head = i - k * p.kv_heads;
    } else {
      const int64_t index = static_cast<int64_t>(i) * blocks + (i & 1 ? blocks - 1 - block : block);
      if (index >= static_cast<int64_t>(a.tiles) * p.kv_heads) return false;
      if (C::FAST) {
        const int64_t band = static_cast<int64_t>(a.run) * p.kv_heads;
        const int first = static_cast<int>(index / band) * a.run, in_band = static_cast<int>(index % band), have = min(a.run, a.tiles - first);
        tile = a.tiles - 1 - first - in_band % have;
        t.kv_head = in_band / have;
      } else {
        tile = a.tiles - 1 - static_cast<int>(index / p.kv_heads);
        t.kv_head = static_cast<int>(index % p.kv_heads);
      }
    }
    t.query0 = tile * a.queries;
    t.last = min(t.query0 + a.queries, p.n) - 1;
    t.begin = first_key(p, t.query0);
    t.end = p.start + t.last + 1;
    t.count = (t.end - t.begin + BN - 1) / BN;
    return true;
  };
  auto skip = [&](int i) { return !C::FAST && a.flagged && !flags[i]; };

  if (warpgroup == WGS) {  // the producer: one thread
    registers_down<C::PRODUCER_REGISTERS>();
    if (threadIdx.x == WGS * 128) {
      prefetch_map(&a.q), prefetch_map(&a.k), prefetch_map(&a.v);
      Ring<STAGES> at;
      Ring<QS> q_at;
      Pace pace(C::FAST ? a.pace : nullptr);
      Item t;
      for (int i = 0; item_of(i, t); i++) {
        if (skip(i)) continue;
        mbarrier_wait(q_empty + 8 * q_at.stage, q_at.phase ^ 1);
        mbarrier_expect(q_full + 8 * q_at.stage, BLOCKS * a.queries * p.group * 128);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
          tma_load(sq + q_at.stage * C::Q_BYTES + b * BM * 128, &a.q, q_full + 8 * q_at.stage, b * 64, t.kv_head * p.group, t.query0);
        q_at.next();
        auto load = [&](const CUtensorMap& map, uint32_t to, uint32_t full, uint32_t empty, int key0) {
          mbarrier_wait(empty + 8 * at.stage, at.phase ^ 1);
          mbarrier_expect(full + 8 * at.stage, C::TILE);
#pragma unroll
          for (int b = 0; b < BLOCKS; b++) tma_load(to + at.stage * C::TILE + b * BN * 128, &map, full + 8 * at.stage, b * 64, t.kv_head, key0);
        };
        for (int tile = 1; tile <= t.count; tile++) {
          pace.step();
          load(a.k, sk, k_full, k_empty, t.end - tile * BN);
          load(a.v, sv, v_full, v_empty, t.end - tile * BN);
          at.next();
        }
      }
      pace.leave();
    }
    return;
  }

  registers_up<C::REGISTERS>();
  const int lane = threadIdx.x % 32;
  const int row0 = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // this thread's rows: row0 and row0 + 8
  // exp(scale s) = 2^(c s). A scale of 0 must still send masked scores (-inf) to 0.
  const float c = fmaxf(p.scale * kLog2e, 1e-30f), per_c = 1 / c;
  Ring<STAGES> at;
  Ring<QS> q_at;
  auto release = [&](uint32_t empty) {
    if (lane == 0) mbarrier_arrive(empty);
  };
  // Warpgroups take turns at the tensor cores, so that one's softmax runs beside another's products.
  auto my_turn = [&] {
    if (C::PINGPONG) bar_sync(1 + warpgroup, 256);
  };
  auto next_turn = [&] {
    if (C::PINGPONG) bar_arrive(1 + (warpgroup + 1 == WGS ? 0 : warpgroup + 1), 256);
  };
  if (warpgroup == WGS - 1) next_turn();

  Item t;
  for (int i = 0; item_of(i, t); i++) {
    if (skip(i)) continue;
    int low[2], high[2];  // first and last key that a row sees
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int query = min(t.query0 + query_of(p, row0 + 8 * h), t.last);
      low[h] = first_key(p, query), high[h] = p.start + query;
    }
    const int open_begin = first_key(p, t.last), open_end = p.start + t.query0 + 1;  // keys that every row sees
    float o[HD / 2], s[BN / 2], top[2] = {-1e30f, -1e30f}, sum[2] = {0, 0}, added[2], shrink[2];
    uint32_t probs[BN / 16][4];
    bool moved = false;
#pragma unroll
    for (int x = 0; x < HD / 2; x++) o[x] = 0;

    auto start_scores = [&] {
#pragma unroll
      for (int kk = 0; kk < HD / 16; kk++)
        Wgmma<BN>::template ss<0, 0>(s, descriptor(sq + q_at.stage * C::Q_BYTES + kk / 4 * BM * 128 + warpgroup * 8192) + kk % 4 * 2,
                                     descriptor(sk + at.stage * C::TILE + kk / 4 * BN * 128) + kk % 4 * 2, kk != 0);
      wgmma_commit();
    };
    auto start_output = [&](int stage) {
#pragma unroll
      for (int kk = 0; kk < BN / 16; kk++) Wgmma<HD>::template rs<1>(o, probs[kk], descriptor(sv + stage * C::TILE, BN * 128) + 128 * kk, 1);
      wgmma_commit();
    };
    auto exact = [&](int key0) { return key0 + max(kExactKeys, BN) >= open_end; };
    /* s becomes P, f32 (FAST: its sums `added`); where the reference moved, `shrink` is what older sums are to be multiplied with. */
    auto softmax = [&](int key0) {
      if (key0 + BN >= open_end) {  // some row may see its first key here
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int to = high[h] - key0 - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < BN / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (j * 8 + e > to) s[4 * j + 2 * h + e] = -INFINITY;
        }
      }
      if (key0 < open_begin) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int from = low[h] - key0 - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < BN / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (j * 8 + e < from) s[4 * j + 2 * h + e] = -INFINITY;
        }
      }
      moved = false;
      if (!C::FAST || exact(key0)) {
        float m[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          m[h] = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
          for (int j = 1; j < BN / 8; j++) m[h] = fmaxf(m[h], fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
          m[h] = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], 1));
          m[h] = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], 2));
        }
        moved = __any_sync(~0u, m[0] > top[0] || m[1] > top[1]);
        if (moved) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float now = fmaxf(top[h], m[h]);
            shrink[h] = exp2_fast((top[h] - now) * c);
            top[h] = now;
            sum[h] *= shrink[h];
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float mc = top[h] * c;
        float part[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < BN / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float x = exp2_fast(fmaf(s[4 * j + 2 * h + e], c, -mc));
            s[4 * j + 2 * h + e] = x;
            part[e] += x;
          }
        if (C::FAST) added[h] = part[0] + part[1];
        else sum[h] += part[0] + part[1];
      }
    };
    auto to_bf16 = [&] {
#pragma unroll
      for (int kk = 0; kk < BN / 16; kk++)
#pragma unroll
        for (int x = 0; x < 4; x++) probs[kk][x] = pack(s[8 * kk + 2 * x], s[8 * kk + 2 * x + 1]);
    };
    /* Moves the reference to the largest P of a tile that outweighs. */
    auto follow = [&] {
      moved = __any_sync(~0u, added[0] * kOutweighs > sum[0] || added[1] * kOutweighs > sum[1]);
      if (!moved) return;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const unsigned lanes = __ballot_sync(~0u, added[h] * kOutweighs > sum[h]);
        float m = 0;
#pragma unroll
        for (int j = 0; j < BN / 8; j++) m = fmaxf(m, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        // Only rows one of whose four lanes says so, and not where the sum may have overflowed, so that it still tells.
        if ((lanes >> (lane & ~3) & 15) == 0 || !(m > 1 && m < 0x1p60f)) m = 1;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(shrink[h]) : "f"(m));
#pragma unroll
        for (int j = 0; j < BN / 8; j++) s[4 * j + 2 * h] *= shrink[h], s[4 * j + 2 * h + 1] *= shrink[h];
        sum[h] *= shrink[h], added[h] *= shrink[h];
        top[h] += __log2f(m) * per_c;
      }
    };
    auto add_sums = [&] {
      if (C::FAST) sum[0] += added[0], sum[1] += added[1];
    };
    auto shrink_output = [&] {
#pragma unroll
      for (int x = 0; x < HD / 2; x++) o[x] *= shrink[x / 2 % 2];
    };
    auto hold_probs = [&] {
#pragma unroll
      for (int kk = 0; kk < BN / 16; kk++) hold(probs[kk]);
    };

    int key0 = t.end - BN;
    mbarrier_wait(q_full + 8 * q_at.stage, q_at.phase);
    mbarrier_wait(k_full + 8 * at.stage, at.phase);
    my_turn();
    hold(s);
    wgmma_fence();
    start_scores();
    next_turn();
    wgmma_wait<0>();
    hold(s);
    release(k_empty + 8 * at.stage);
    softmax(key0);
    add_sums();
    to_bf16();
#pragma unroll 1
    for (int tile = 1; tile < t.count; tile++) {
      const Ring<STAGES> before = at;
      at.next();
      key0 -= BN;
      mbarrier_wait(k_full + 8 * at.stage, at.phase);
      mbarrier_wait(v_full + 8 * before.stage, before.phase);
      my_turn();
      hold(s), hold(o), hold_probs();
      wgmma_fence();
      start_scores();
      start_output(before.stage);
      next_turn();
      wgmma_wait<1>();
      hold(s);
      if (!C::BESIDE) release(k_empty + 8 * at.stage);
      softmax(key0);
      const bool follows = C::FAST && !exact(key0);
      if (C::BESIDE) {
        if (follows) follow();
        add_sums();
      }
      // Nothing but a memory operation that needs all exponentials keeps ptxas from moving the next wait before them. Sums are never negative.
      if (C::BESIDE && lane == 0 && !(sum[0] + sum[1] == -1.0f)) mbarrier_arrive(k_empty + 8 * at.stage);
      wgmma_wait<0>();
      hold(o), hold_probs();
      release(v_empty + 8 * before.stage);
      if (moved) shrink_output();
      to_bf16();
      if (!C::BESIDE) {
        if (follows) {  // here the packing hides the vote
          follow();
          if (moved) shrink_output(), to_bf16();
        }
        add_sums();
      }
    }
    release(q_empty + 8 * q_at.stage);
    q_at.next();
    mbarrier_wait(v_full + 8 * at.stage, at.phase);
    my_turn();
    hold(o), hold_probs();
    wgmma_fence();
    start_output(at.stage);
    next_turn();
    wgmma_wait<0>();
    hold(o);
    release(v_empty + 8 * at.stage);
    at.next();

#pragma unroll
    for (int h = 0; h < 2; h++) {
      float l = sum[h];
      l += __shfl_xor_sync(~0u, l, 1);
      l += __shfl_xor_sync(~0u, l, 2);
      const bool sound = !C::FAST || l <= 0x1p60f;
      const int row = row0 + 8 * h, local = query_of(p, row), query = t.query0 + local;
      const bool exists = local < a.queries && query < p.n;
      const int head = t.kv_head * p.group + row - local * p.group;
      float m = top[h] * c, factor = 1;  // in powers of two
      if (p.sinks && exists) {
        const float sink = p.sinks[head] * kLog2e, both = fmaxf(m, sink);
        factor = exp2f(m - both);
        l = l * factor + exp2f(sink - both);
        m = both;
      }
      if (exists && lane % 4 == 0) a.f.lse[static_cast<int64_t>(query) * p.heads + head] = sound ? m * kLn2 + logf(l) : INFINITY;
      store_row<HD>(exists ? static_cast<bf16*>(a.f.out) + query * a.f.out_stride + static_cast<int64_t>(head) * HD : nullptr,
                    *reinterpret_cast<const float(*)[HD / 8][4]>(&o), h, factor / l, HD);
    }
  }
  if (C::PINGPONG && warpgroup == 0) bar_sync(1, 256);  // takes the last arrival
#endif
}

}  // namespace attention::cuda
#endif
