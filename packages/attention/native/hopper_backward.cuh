/* Attention's backward for Hopper (sm_90a): dQ, dK and dV in one kernel of five products, after FlashAttention-2 and 3 (Dao 2023; Shah et al. 2024).
 *
 * A block owns 128 keys of one K/V head. It goes over the tiles of 64 or 128 queries that see them, from the last down, and within a tile over the heads of the group, so that dK and dV stay
 * in registers over the whole group and are added to memory once. Two warpgroups of 64 keys each: scores are computed transposed (keys are rows), so that P and dS are left operands in
 * registers; dS also goes through shared memory, for dQ = dS K, of which each warpgroup computes half. The third warpgroup's warps copy tiles in and dQ out.
 *
 * dQ is summed in f32 memory by bulk reductions of whole tiles, laid out as the accumulators lie in registers. ORDERED: a tile's sum is made in rising order of keys. A counter per
 * tile and head says whose turn it is; the first stores, so that nothing needs clearing, and the last, that of the diagonal, makes bf16 of the sum before its block ends. Blocks take their
 * keys from a ticket counter in rising order, so whoever is waited for is running
 * or done; and since all go through the queries in one order, the block of the next keys follows a step or two behind. It must not fall back further: what blocks share of Q, dO and dQ is
 * then gone from the L2 cache, additions take longer to arrive, and the distance grows. So every buffer of dQ has a thread of its own, which passes the turn on the moment its addition has
 * arrived and holds up neither the other buffer nor the block. */
#ifndef LC_ATTENTION_HOPPER_BACKWARD_CUH
#define LC_ATTENTION_HOPPER_BACKWARD_CUH
#include "hopper_backward_ends.cuh"
#include "lctx/hopper.cuh"
#include "tiles.cuh"

namespace attention::cuda {

struct HopperBackward {
  CUtensorMap q, dout, k, v;
  Problem p;
  float *dk, *dv;
  int64_t dk_stride, dv_stride;
  bf16* dq;           /* ORDERED: the block of the last keys that a query sees writes its row */
  int64_t dq_stride;
  float* dq_sum;      /* [heads, tiles, M * HD] */
  const float* lse;   /* [heads, tiles * M], times log2(e); infinity beyond n */
  const float* delta; /* [heads, tiles * M] */
  const int* low;     /* [tiles]: first tile of keys that a tile of queries sees; does not decrease */
  int* turn;          /* [heads, tiles]: how many tiles of keys were added to dQ */
  int* ticket;
  int tiles, first_tile; /* tiles of queries; first tile of keys */
  int run, rows_end;     /* one K/V head has `run` tiles of keys in a row before the next head, up to tile `rows_end` (a multiple of `run`) from the first; from there on one */
  const float* sink_partial; /* [kSinkParts, heads], or null */
  float* dsinks;
};

/* M: queries of a tile; at 128 dV waits until P and dP are dS, for want of registers for P twice (f32 for dS, bf16 for dV). DQ_BUFFERS: tiles of dQ on their way to memory. */
template <int M_, int HD_, int STAGES_, int DQ_BUFFERS_, bool ORDERED_>
struct HopperBackwardConfig {
  static constexpr int M = M_, N = 128, THREADS = 384, HD = HD_, STAGES = STAGES_, DQB = DQ_BUFFERS_;
  static constexpr bool ORDERED = ORDERED_;
  static constexpr int KEYS = N * HD * 2, ROWS = M * HD * 2, DS = M * N * 2, DQ = M * HD * 4; /* bytes of a tile */
  static constexpr int AT_K = 0, AT_V = KEYS, AT_Q = 2 * KEYS, AT_DO = AT_Q + STAGES * ROWS, AT_DS = AT_DO + STAGES * ROWS, AT_DQ = AT_DS + 2 * DS, AT_LSE = AT_DQ + DQB * DQ,
                       AT_DELTA = AT_LSE + STAGES * M * 4, AT_BAR = AT_DELTA + STAGES * M * 4, BARRIERS = 4 * STAGES + 2 + 2 * DQB;
  static constexpr int SMEM = AT_BAR + BARRIERS * 8 + 16;
  static_assert(DQB <= 3);  /* a warp each */
  static_assert(SMEM <= 227 << 10, "more shared memory than a block has");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void store_shared(uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ __forceinline__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(int* p, int v) { asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
/* Between this thread's ordinary accesses and those that it has the copy engine make. */
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

/* The steps of one block: tiles of queries from the last down, and within one the heads of the group; with them the place in the ring of stages. */
struct BackwardSteps {
  int tile, h = 0, stage = 0, phase = 0;
  __device__ __forceinline__ explicit BackwardSteps(int last) : tile(last) {}
  template <int STAGES>
  __device__ __forceinline__ void next(int group) {
    if (++h == group) h = 0, tile--;
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

/* The first i of [low, high) with values[i] above `value`, or high; values do not decrease. By a warp: two rounds of loads where first_above takes ten. */
__device__ __forceinline__ int warp_first_above(const int* values, int low, int high, int value) {
  while (low < high) {
    const int step = (high - low + 31) / 32, at = low + static_cast<int>(threadIdx.x) % 32 * step;
    const uint32_t above = __ballot_sync(~0u, at >= high || values[at] > value);
    const int lane = above ? __ffs(static_cast<int>(above)) - 1 : 32;
    if (lane == 0) return low;
    high = min(high, low + lane * step);
    low += (lane - 1) * step + 1;
  }
  return high;
}

/* Which keys the block of a ticket has. */
struct BackwardKeys {
  int kv_head, tile;
  __device__ __forceinline__ BackwardKeys(const HopperBackward& a, int ticket) {
    const int heads = a.p.kv_heads, last = ticket - a.rows_end * heads;
    kv_head = last < 0 ? ticket / a.run % heads : last % heads;
    tile = a.first_tile + (last < 0 ? ticket / (a.run * heads) * a.run + ticket % a.run : a.rows_end + last / heads);
  }
};

/* dSinks from the sums of the parts, by a warp. */
__device__ __forceinline__ void add_sinks(float* dsinks, const float* parts, int heads) {
  for (int head = threadIdx.x % 32; head < heads; head += 32) {
    float sum = 0;
#pragma unroll 4
    for (int part = 0; part < kSinkParts; part++) sum += parts[static_cast<int64_t>(part) * heads + head];
    dsinks[head] -= sum;
  }
}
__device__ __forceinline__ void add_memory(float* to, float x, float y) { asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory"); }

/* dQ, complete, of the queries of which no later keys are seen; by eight warps, each with several loads under way. */
template <class C>
__device__ __forceinline__ void write_dq(const HopperBackward& a, const BackwardKeys& keys) {
  constexpr int M = C::M, HD = C::HD, PIECES = M / 64, PARTS = QueryGradient::parts<HD>(), AT_ONCE = 4;
  const Problem& p = a.p;
  const int key0 = keys.tile * C::N, first = max(0, key0 - p.start) / M, last = key0 + C::N >= p.start + p.n ? a.tiles : (key0 + C::N - p.start) / M;
  const int count = (last - first) * p.group * PIECES * PARTS;
  struct Place { int head, query, part; };
  const auto place = [&](int i) {
    const int piece = i / PARTS, tile = piece / PIECES;
    return Place{keys.kv_head * p.group + tile % p.group, (first + tile / p.group) * M + piece % PIECES * 64, i % PARTS};
  };
#pragma unroll 1
  for (int i0 = threadIdx.x / 32; i0 < count; i0 += 8 * AT_ONCE) {
    QueryGradient x[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
      if (const int i = i0 + j * 8; i < count) {
        const Place at = place(i);
        x[j].template load<HD>(a.dq_sum + (static_cast<int64_t>(at.head) * a.tiles * M + at.query) * HD, at.part);
      }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
      if (const int i = i0 + j * 8; i < count) {
        const Place at = place(i);
        x[j].template store<HD>(a.dq + at.query * a.dq_stride + static_cast<int64_t>(at.head) * p.dim, a.dq_stride, at.part, p.n - at.query, p.dim, p.scale);
      }
  }
}
#endif

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) hopper_backward_kernel(const __grid_constant__ HopperBackward a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace lctx::hopper;
  constexpr int M = C::M, N = C::N, HD = C::HD, STAGES = C::STAGES, DQB = C::DQB;
  extern __shared__ __align__(1024) unsigned char memory[];
  const Problem& p = a.p;
  const uint32_t base = smem(memory), bars = base + C::AT_BAR;
  const uint32_t full_q = bars, full_do = bars + 8 * STAGES, empty_q = bars + 16 * STAGES, empty_do = bars + 24 * STAGES, full_kv = bars + 32 * STAGES, dq_full = full_kv + 8,
                 dq_empty = dq_full + 8 * DQB, dq_done = dq_empty + 8 * DQB;
  int* ticket = reinterpret_cast<int*>(memory + C::AT_BAR + 8 * C::BARRIERS);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    const int mine = atomicAdd(a.ticket, 1);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full_q + 8 * s, 1);
      mbarrier_init(full_do + 8 * s, 1);
      mbarrier_init(empty_q + 8 * s, 8);
      mbarrier_init(empty_do + 8 * s, 8);
    }
    mbarrier_init(full_kv, 1);
    mbarrier_init(dq_done, DQB);
    for (int s = 0; s < DQB; s++) {
      mbarrier_init(dq_full + 8 * s, 8);
      mbarrier_init(dq_empty + 8 * s, 1);
    }
    mbarrier_init_fence();
    *ticket = mine;
  }
  __syncthreads();
  const BackwardKeys mine(a, *ticket);
  const int kv_head = mine.kv_head, key_tile = mine.tile, key0 = key_tile * N;
  if (*ticket == 0 && warp == 11 && a.sink_partial != nullptr) add_sinks(a.dsinks, a.sink_partial, p.heads);
  const int begin = max(0, key0 - p.start) / M;  // query tiles
  // The first whose first key lies beyond.
  const int end = p.doc_start == nullptr && p.window == 0 ? max(begin, a.tiles) : warp_first_above(a.low, begin, max(begin, a.tiles), key_tile);
  if (begin >= end || key0 >= p.start + p.n) return;
  const int group = p.group, head0 = kv_head * group, steps = (end - begin) * group;

  if (warp >= 8) {
    registers_down<24>();
    if (warp == 8 && threadIdx.x % 32 == 0) {  // loads
      mbarrier_expect(full_kv, 2 * C::KEYS);
      for (int x = 0; x < HD / 64; x++) {
        tma_load(base + C::AT_K + x * N * 128, &a.k, full_kv, x * 64, kv_head, key0);
        tma_load(base + C::AT_V + x * N * 128, &a.v, full_kv, x * 64, kv_head, key0);
      }
      BackwardSteps at(end - 1);
#pragma unroll 1
      for (int t = 0; t < steps; t++) {
        const int head = head0 + at.h, s = at.stage;
        const int64_t row = (static_cast<int64_t>(head) * a.tiles + at.tile) * M;
        if (t >= STAGES) mbarrier_wait(empty_q + 8 * s, at.phase ^ 1);
        mbarrier_expect(full_q + 8 * s, C::ROWS + M * 4);
        for (int x = 0; x < HD / 64; x++) tma_load(base + C::AT_Q + s * C::ROWS + x * M * 128, &a.q, full_q + 8 * s, x * 64, head, at.tile * M);
        bulk_load(base + C::AT_LSE + s * M * 4, a.lse + row, M * 4, full_q + 8 * s);
        if (t >= STAGES) mbarrier_wait(empty_do + 8 * s, at.phase ^ 1);
        mbarrier_expect(full_do + 8 * s, C::ROWS + M * 4);
        for (int x = 0; x < HD / 64; x++) tma_load(base + C::AT_DO + s * C::ROWS + x * M * 128, &a.dout, full_do + 8 * s, x * 64, head, at.tile * M);
        bulk_load(base + C::AT_DELTA + s * M * 4, a.delta + row, M * 4, full_do + 8 * s);
        at.next<STAGES>(group);
      }
    } else if (warp < 9 + DQB && threadIdx.x % 32 == 0) {  // dQ to memory: a thread per buffer
      const int buffer = warp - 9;
      int phase = 0;
#pragma unroll 1
      for (int t = buffer; t < steps; t += DQB, phase ^= 1) {
        const int down = query_of(p, t), tile = end - 1 - down, before = key_tile - a.low[tile];  // tiles of keys whose turn is before this one's
        const int64_t here = static_cast<int64_t>(head0 + t - down * group) * a.tiles + tile;
        const uint32_t from = base + C::AT_DQ + buffer * C::DQ;
        float* to = a.dq_sum + here * M * HD;
        mbarrier_wait(dq_full + 8 * buffer, phase);
        if (C::ORDERED && before > 0) {
          while (load_acquire(a.turn + here) != before) __nanosleep(32);
          fence_copies();
        }
        if (C::ORDERED && before == 0) bulk_store(to, from, C::DQ);
        else bulk_add(to, from, C::DQ);
        bulk_commit();
        bulk_wait_read<0>();
        mbarrier_arrive(dq_empty + 8 * buffer);
        if (C::ORDERED) {
          bulk_wait<0>();
          fence_copies();
          store_release(a.turn + here, before + 1);
        }
      }
      bulk_wait<0>();
      if (C::ORDERED) {
        fence_copies();
        mbarrier_arrive(dq_done);
      }
    }
    return;
  }

  registers_up<240>();
  const int w = warp / 4, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const uint32_t sk = base + C::AT_K, sv = base + C::AT_V;
  const int key_w = key0 + w * 64;
  float dk[HD / 2] = {}, dv[HD / 2] = {}, s[M / 2] = {}, d[M / 2] = {}, dq[M * HD / 256] = {};
  uint32_t pr[M / 16][4], dr[M / 16][4];
  mbarrier_wait(full_kv, 0);
  // Left operand: this warpgroup's 64 keys. Right operand: the rows of a tile of Q or dO.
  const uint64_t k_left = descriptor(sk + w * 8192), v_left = descriptor(sv + w * 8192);
  const auto scores = [&](float (&to)[M / 2], uint64_t left, uint32_t tile) {
    const uint64_t right = descriptor(tile);
#pragma unroll
    for (int kk = 0; kk < HD / 16; kk++)
      Wgmma<M>::template ss<0, 0>(to, left + kk / 4 * (N * 128 / 16) + kk % 4 * 2, right + kk / 4 * (M * 128 / 16) + kk % 4 * 2, kk > 0);
    wgmma_commit();
  };
  const auto gradient = [&](float (&to)[HD / 2], const uint32_t (&r)[M / 16][4], uint32_t tile) {
    const uint64_t right = descriptor(tile, M * 128);
#pragma unroll
    for (int kk = 0; kk < M / 16; kk++) Wgmma<HD>::template rs<1>(to, r[kk], right + kk * 128, 1);
    wgmma_commit();
  };

  const float c = p.scale * kLog2e;
  const int column = lane % 4 * 2;
  // stmatrix: lane l gives row l % 8 of 8 x 8 block l / 8; blocks: keys + 0, keys + 8, then 8 queries further.
  const uint32_t ds_chunk = ((warp % 4 * 2 + (lane / 8 & 1)) ^ (lane & 7)) << 4, ds_at = base + C::AT_DS + w * M * 128 + (lane / 16 * 8 + (lane & 7)) * 128 + ds_chunk;
  // dQ: at 64 queries each warpgroup takes half of the dims, at 128 half of the queries.
  constexpr int DQ_COLUMNS = M == 64 ? HD / 2 : HD;
  const uint64_t k_dims = descriptor(sk + (M == 128 ? 0 : HD == 64 ? w * 64 : w * N * 128), N * 128);
  const int ds_rows = M == 128 ? w * 8192 : 0;
  BackwardSteps at(end - 1);
  int dq_buffer = 0, dq_phase = 1;  // the first wait for an empty buffer passes

  const auto put_dq = [&]() {
    mbarrier_wait(dq_empty + 8 * dq_buffer, dq_phase);
    const uint32_t to = base + C::AT_DQ + dq_buffer * C::DQ + (w * (M * HD / 1024) * 128 + thread) * 16;
#pragma unroll
    for (int j = 0; j < DQ_COLUMNS / 8; j++) store_shared(to + j * 2048, dq[j * 4], dq[j * 4 + 1], dq[j * 4 + 2], dq[j * 4 + 3]);
    fence_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(dq_full + 8 * dq_buffer);
    if (++dq_buffer == DQB) dq_buffer = 0, dq_phase ^= 1;
  };

  // P^T of a step, for the next product and (packed) for dV.
  bool masked = true;
  const auto probabilities = [&](const BackwardSteps& x) {
    const int query0 = x.tile * M;
    if (x.h == 0 || x.tile == end - 1) masked = key_w + 63 > p.start + query0 || query0 + M > p.n || first_key(p, min(query0 + M, p.n) - 1) > key_w;
    const uint32_t lse_at = base + C::AT_LSE + x.stage * M * 4 + column * 4;
#pragma unroll
    for (int j = 0; j < M / 8; j++) {
      const float2 lse = load_shared(lse_at + j * 32);
#pragma unroll
      for (int e = 0; e < 4; e++) s[j * 4 + e] = exp2_fast(fmaf(s[j * 4 + e], c, -(e % 2 ? lse.y : lse.x)));
    }
    if (masked) {
      const int key = key_w + warp % 4 * 16 + lane / 4;
#pragma unroll
      for (int j = 0; j < M / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int query = query0 + j * 8 + column + e, last = query < p.n ? p.start + query : -1, first = first_key(p, min(query, p.n - 1));
          if (key < first || key > last) s[j * 4 + e] = 0;
          if (key + 8 < first || key + 8 > last) s[j * 4 + 2 + e] = 0;
        }
    }
  };
  // 16 queries of P^T and of dS^T = P^T (dP^T - delta) as operands. Each pair of registers takes the place of four that it was made from.
  const auto pack_p = [&](int kk) {
#pragma unroll
    for (int i = 0; i < 4; i++) pr[kk][i] = pack(s[kk * 8 + i * 2], s[kk * 8 + i * 2 + 1]);
    hold(pr[kk]);
  };
  const auto scores_gradient = [&](int kk, int stage) {
    const uint32_t delta_at = base + C::AT_DELTA + (stage * M + kk * 16 + column) * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 delta = load_shared(delta_at + i / 2 * 32);
      const int x = kk * 8 + i * 2;
      dr[kk][i] = pack(s[x] * (d[x] - delta.x), s[x + 1] * (d[x + 1] - delta.y));
    }
    hold(dr[kk]);
  };

  hold(s), hold(d), hold(dq), hold(dk), hold(dv);
  int t = 0;
#pragma unroll 1
  do {
    const int stage = at.stage;
    // 0 in a way that the compiler does not see, so that it does not keep a register pair per descriptor over the loop.
    int nothing = stage;
    asm volatile("" : "+r"(nothing));
    nothing >>= 8;
    mbarrier_wait(full_q + 8 * stage, at.phase);
    wgmma_fence();
    scores(s, k_left + nothing, base + C::AT_Q + stage * C::ROWS);
    mbarrier_wait(full_do + 8 * stage, at.phase);
    wgmma_fence();
    scores(d, v_left + nothing, base + C::AT_DO + stage * C::ROWS);
    wgmma_wait<1>();
    hold(s);
    probabilities(at);
    wgmma_wait<0>();
    hold(d);
    if constexpr (M == 64) {  // dV's product beside the making of dS
#pragma unroll
      for (int kk = 0; kk < M / 16; kk++) pack_p(kk);
      wgmma_fence();
      gradient(dv, pr, base + C::AT_DO + stage * C::ROWS);
    }
#pragma unroll
    for (int kk = 0; kk < M / 16; kk++) {
      if constexpr (M == 128) pack_p(kk);
      scores_gradient(kk, stage);
    }
    const uint32_t ds_buffer = (t & 1) * C::DS;
#pragma unroll
    for (int kk = 0; kk < M / 16; kk++) stmatrix_trans(ds_at + ds_buffer + kk * 2048, dr[kk]);
    fence_async();
    bar_sync(1, 256);
    const uint64_t left = descriptor(base + C::AT_DS + ds_buffer + ds_rows);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 8; kk++) Wgmma<DQ_COLUMNS>::template ss<0, 1>(dq, left + kk / 4 * (M * 128 / 16) + kk % 4 * 2, k_dims + nothing + kk * 128, kk > 0);
    wgmma_commit();
    if constexpr (M == 128) gradient(dv, pr, base + C::AT_DO + stage * C::ROWS);  // beside dQ's way to memory
    gradient(dk, dr, base + C::AT_Q + stage * C::ROWS);
    wgmma_wait<M == 128 ? 2 : 1>();
    hold(dq);
    if constexpr (M == 64)
      if (lane == 0) mbarrier_arrive(empty_do + 8 * stage);
    put_dq();
    if constexpr (M == 128) {
      wgmma_wait<1>();
      if (lane == 0) mbarrier_arrive(empty_do + 8 * stage);
    }
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(empty_q + 8 * stage);
    at.next<STAGES>(group);
  } while (++t < steps);
  hold(dk), hold(dv);
  const int keys = p.start + p.n;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int key = key_w + warp % 4 * 16 + h * 8 + lane / 4;
    if (key >= keys) continue;
    float* to_k = a.dk + key * a.dk_stride + static_cast<int64_t>(kv_head) * p.dim;
    float* to_v = a.dv + key * a.dv_stride + static_cast<int64_t>(kv_head) * p.dim;
#pragma unroll
    for (int j = 0; j < HD / 8; j++)
      if (j * 8 < p.dim) {
        add_memory(to_k + j * 8 + column, dk[j * 4 + h * 2] * p.scale, dk[j * 4 + h * 2 + 1] * p.scale);
        add_memory(to_v + j * 8 + column, dv[j * 4 + h * 2], dv[j * 4 + h * 2 + 1]);
      }
  }
  if constexpr (C::ORDERED) {
    mbarrier_wait(dq_done, 0);
    write_dq<C>(a, BackwardKeys(a, *static_cast<volatile int*>(ticket)));  // again, rather than in registers over the whole loop
  }
#endif
}

}  // namespace attention::cuda
#endif
