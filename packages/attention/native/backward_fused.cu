/* dQ, dK and dV in one kernel of five products, where two kernels need seven; dQ is summed in memory, in no fixed order. As in backward_kv.cu a block owns BN
 * keys and walks over the rows that see them, keys as the rows of every product, so that only dS passes through shared memory, for dQ += dS K. That product
 * follows in the walk's next step, when the other warps have long written their dS: one barrier per tile. Rows are walked from the last to the first: blocks
 * that run at the same time are then at the same rows, and meet q, dout and dQ's sums in the L2 cache. Measurements: LAB.md. */
#include "tiles.cuh"

namespace attention::cuda {
namespace {

constexpr int kFusedRows = 64;  // of a tile; src/plan.ts knows it

/* EVEN: `group` divides the rows between two loads of a thread, whose addresses then differ by a constant. */
template <int HD_, int MI_, int WARPS_, int CTAS_, int WM_, bool EVEN_>
struct Fused {
  static constexpr int HD = HD_, MI = MI_, WARPS = WARPS_, BM = kFusedRows, CTAS = CTAS_, THREADS = WARPS * 32, BN = MI * 16 * WARPS;
  static constexpr int WM = WM_, WN = WARPS / WM;  // warps along the rows and dims of dQ's tile
  static constexpr int MQ = BM / 16 / WM, NQ = HD / 8 / WN;
  static constexpr int ROWS = HD == 32 ? BM : BM / 2;  // of a tile, worked on at a time: as in backward_kv.cu
  static constexpr int CHUNKS = HD / 8, STEP = THREADS / CHUNKS;
  static constexpr bool EVEN = EVEN_ && THREADS % CHUNKS == 0 && STEP % 8 == 0 && BM % STEP == 0;
  static constexpr int KEYS = BN * HD * 2, TILE = BM * HD * 2, DS = BN * BM * 2, SMEM = 2 * KEYS + 4 * TILE + 2 * DS + 2 * BM * 12;
  static_assert(BM <= THREADS && MQ * WM * 16 == BM && NQ * WN * 8 == HD && NQ % 2 == 0, "tiles");
  static_assert(SMEM <= kSharedEverywhere, "shared memory");
};

/* 4 bytes; zero unless `valid`. */
__device__ __forceinline__ void cp_async4(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#else
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 4; m++) {  // the lane that names the row, then a word of it
    const uint32_t row = __shfl_sync(~0u, address, m * 8 + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(row + lane % 4 * 4), "r"(r[m]) : "memory");
  }
#endif
}
/* A 16 x 8 fragment of an accumulator, in memory as [value, lane]: 128 bytes of a warp side by side. */
__device__ __forceinline__ void add_fragment(float* fragment, const float (&v)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) atomicAdd(fragment + e * 32 + threadIdx.x % 32, v[e]);
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::CTAS) fused_kernel(const __grid_constant__ Backward b, int key_base) {
  constexpr int HD = C::HD, MI = C::MI, BN = C::BN, BM = C::BM, ROWS = C::ROWS, THREADS = C::THREADS;
  extern __shared__ __align__(128) unsigned char smem[];
  const Problem& p = b.p;
  const int kv_head = static_cast<int>(blockIdx.x) % p.kv_heads, group = p.group;
  const int key0 = key_base + static_cast<int>(blockIdx.x) / p.kv_heads * BN, keys = p.start + p.n, rows = p.n * group;
  const int last_key = min(key0 + BN, keys) - 1;
  // Queries that see any of the keys.
  const int begin = max(0, key0 - p.start), end = end_of_queries(p, begin, last_key);
  if (begin >= end) return;
  const int first_tile = begin * group / BM, last_tile = (end * group - 1) / BM, count = last_tile - first_tile + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const uint32_t sk = smem_address(smem), sv = sk + C::KEYS, sq = sv + C::KEYS, sdo = sq + 2 * C::TILE, sds = sdo + 2 * C::TILE;
  // Per stage and row: lse; delta; first token of its document.
  constexpr int ROW_AT = 2 * C::KEYS + 4 * C::TILE + 2 * C::DS;
  const float* row_lse = reinterpret_cast<const float*>(smem + ROW_AT);
  const float* row_delta = row_lse + 2 * BM;
  const int* row_doc = reinterpret_cast<const int*>(row_delta + 2 * BM);
  const int64_t head0 = static_cast<int64_t>(kv_head) * group;
  const bf16* q = static_cast<const bf16*>(p.q) + head0 * p.dim;
  const bf16* dout = static_cast<const bf16*>(b.dout) + head0 * p.dim;
  float* dq_sum = b.dq_sum + static_cast<int64_t>(kv_head) * ((rows + BM - 1) / BM) * (BM * HD);
  KeyTiles<HD, BN, THREADS>(p.k, p.k_stride, kv_head, p.dim).load(sk, key0, 0, keys, p.dim, p.k);
  KeyTiles<HD, BN, THREADS>(p.v, p.v_stride, kv_head, p.dim).load(sv, key0, 0, keys, p.dim, p.v);

  const bf16 *q_from = nullptr, *dout_from = nullptr;  // this thread's part of a tile's first row
  if constexpr (C::EVEN) {
    const int r = threadIdx.x / C::CHUNKS, query = query_of(p, r), column = (r - query * group) * p.dim + threadIdx.x % C::CHUNKS * 8;
    q_from = q + query * p.q_stride + column;
    dout_from = dout + query * b.dout_stride + column;
  }
  auto load = [&](int row0, int stage) {
    if constexpr (C::EVEN) {
      const int r = threadIdx.x / C::CHUNKS, chunk = threadIdx.x % C::CHUNKS;
      const int64_t query = query_of(p, row0);
      const bf16 *from_q = q_from + query * p.q_stride, *from_dout = dout_from + query * b.dout_stride;
      const int64_t step_q = query_of(p, C::STEP) * p.q_stride, step_dout = query_of(p, C::STEP) * b.dout_stride;
      const uint32_t to = stage * C::TILE + Rows<HD>::at(r, chunk);
      const bool whole = row0 + BM <= rows, exists = chunk * 8 < p.dim;
#pragma unroll
      for (int i = 0; i < BM / C::STEP; i++) {
        const bool valid = exists && (whole || row0 + r + i * C::STEP < rows);
        cp_async(sq + to + i * C::STEP * Rows<HD>::BYTES, valid ? from_q : p.q, valid);
        cp_async(sdo + to + i * C::STEP * Rows<HD>::BYTES, valid ? from_dout : b.dout, valid);
        from_q += step_q, from_dout += step_dout;
      }
    } else {
      load_row_tiles<HD, BM, THREADS>(b, q, dout, sq + stage * C::TILE, sdo + stage * C::TILE, row0, rows);
    }
    if (threadIdx.x < BM) {  // rows that do not exist: zeros in q and dout make every gradient zero
      const int row = row0 + static_cast<int>(threadIdx.x), query = query_of(p, row);
      const bool valid = row < rows;
      const int64_t at = valid ? static_cast<int64_t>(query) * p.heads + head0 + (row - query * group) : 0;
      const uint32_t to = smem_address(smem) + ROW_AT + (stage * BM + threadIdx.x) * 4;
      cp_async4(to, b.lse + at, valid);
      cp_async4(to + 8 * BM, b.delta + at, valid);
      if (p.doc_start) cp_async4(to + 16 * BM, p.doc_start + (valid ? query : 0), true);
    }
    cp_async_commit();
  };
  load(last_tile * BM, 0);

  const Fragment<HD> fa = a_fragment<HD>(warp * MI * 16), fb = b_fragment<HD>(), ft = t_fragment<HD>();
  const Fragment<BM> fs = a_fragment<BM>(warp * MI * 16), fr = b_fragment<BM>();  // dS [keys, rows]: as it is written; read transposed
  const int wm = warp % C::WM, wn = warp / C::WM;
  // dQ of a tile's rows from these keys.
  auto add_dq = [&](int tile, uint32_t ds) {
    float acc[C::MQ][C::NQ][4] = {};
#pragma unroll
    for (int kk = 0; kk < BN / 16; kk++) {
      uint32_t a[C::MQ][4];
#pragma unroll
      for (int i = 0; i < C::MQ; i++) ldmatrix<true>(a[i], fr.get(ds, kk, wm * C::MQ + i));
#pragma unroll
      for (int j = 0; j < C::NQ / 2; j++) {
        uint32_t f[4];
        ldmatrix<true>(f, ft.get(sk, kk, wn * (C::NQ / 2) + j));
#pragma unroll
        for (int i = 0; i < C::MQ; i++) {
          mma(acc[i][j * 2], a[i], f[0], f[1]);
          mma(acc[i][j * 2 + 1], a[i], f[2], f[3]);
        }
      }
    }
    float* to = dq_sum + static_cast<int64_t>(tile) * (BM * HD);
#pragma unroll
    for (int i = 0; i < C::MQ; i++)
#pragma unroll
      for (int j = 0; j < C::NQ; j++) add_fragment(to + ((wm * C::MQ + i) * (HD / 8) + wn * C::NQ + j) * 128, acc[i][j]);
  };

  float dk[MI][HD / 8][4] = {}, dv[MI][HD / 8][4] = {};
  const float c = p.scale * kLog2e;
#pragma unroll 1
  for (int step = 0; step < count; step++) {
    const int stage = step & 1;
    cp_async_wait<0>();
    __syncthreads();
    const bool more = step + 1 < count;
    if (more) load((last_tile - step - 1) * BM, stage ^ 1);
    const uint32_t tq = sq + stage * C::TILE, tdo = sdo + stage * C::TILE, ds = sds + stage * C::DS;
    const int column = stage * BM + lane % 4 * 2;  // this lane's first row of the tile
    const int row0 = (last_tile - step) * BM;
    auto first_seen = [&](int query, int r) {  // of row r of the tile; rows that do not exist do not matter
      int x = p.doc_start ? max(0, row_doc[stage * BM + r]) : 0;
      if (p.window > 0) x = max(x, p.start + query - p.window + 1);
      return min(x, p.start + query);
    };
    const int near = p.start + query_of(p, row0), last_row = min(BM, rows - row0) - 1, last_query = query_of(p, row0 + last_row), far = first_seen(last_query, last_row);
    const bool masked = near < key0 + BN - 1 || far > key0;
    const int low = key0 + warp * MI * 16;
    const bool unseen = masked && (low > p.start + last_query || low + MI * 16 <= first_seen(query_of(p, row0), 0));  // none of this warp's keys is seen from here

    if (step > 0) add_dq(last_tile - step + 1, sds + (stage ^ 1) * C::DS);
    if (unseen) {
      const uint32_t zero[4] = {};
#pragma unroll
      for (int kk = 0; kk < BM / 16; kk++)
#pragma unroll
        for (int i = 0; i < MI; i++) stmatrix(fs.get(ds, i, kk), zero);
    } else {
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
            for (int e = 0; e < 4; e++) s[i][j][e] = exp2_fast(fmaf(s[i][j][e], c, (e % 2 ? lse.y : lse.x) * -kLog2e));
        }
        if (masked) {
#pragma unroll
          for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int x = r + lane % 4 * 2 + j * 8 + e % 2, query = query_of(p, row0 + x), first = first_seen(query, x), last = p.start + query;
#pragma unroll
              for (int i = 0; i < MI; i++) {
                const int key = low + i * 16 + e / 2 * 8 + lane / 4;
                if (key < first || key > last) s[i][j][e] = 0;
              }
            }
        }

        // dV += P^T dO
#pragma unroll
        for (int kk = 0; kk < ROWS / 16; kk++) {
          uint32_t a[MI][4];
#pragma unroll
          for (int i = 0; i < MI; i++) pack_columns(a[i], s[i], kk);
          multiply_columns(dv, a, ft, dout_rows, kk);
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
          for (int i = 0; i < MI; i++) {
            pack_columns(a[i], d[i], kk);
            stmatrix(fs.get(ds, i, r / 16 + kk), a[i]);
          }
          multiply_columns(dk, a, ft, q_rows, kk);
        }
      }
    }
  }
  __syncthreads();
  add_dq(first_tile, sds + ((count - 1) & 1) * C::DS);

  add_to_keys(b, dk, dv, kv_head, key0 + warp * MI * 16, keys, 0);
}

/* dq = scale * dq_sum, as bf16: a warp per 16 rows. */
template <class C>
__global__ void __launch_bounds__(256) dq_kernel(const __grid_constant__ Backward b) {
  constexpr int HD = C::HD;
  const Problem& p = b.p;
  const int rows = p.n * p.group, lane = threadIdx.x % 32;
  const int64_t per_head = static_cast<int64_t>((rows + C::BM - 1) / C::BM) * (C::BM / 16), at = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (at >= per_head * p.kv_heads) return;
  const int kv_head = static_cast<int>(at / per_head), row0 = static_cast<int>(at - kv_head * per_head) * 16;
  const float* from = b.dq_sum + at * (16 * HD);
  float acc[HD / 8][4];
#pragma unroll
  for (int j = 0; j < HD / 8; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) acc[j][e] = from[j * 128 + e * 32 + lane];
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + h * 8 + lane / 4, query = query_of(p, row);
    bf16* to = row < rows ? static_cast<bf16*>(b.dq) + query * b.dq_stride + (static_cast<int64_t>(kv_head) * p.group + row - query * p.group) * p.dim : nullptr;
    store_row<HD>(to, acc, h, p.scale, p.dim);
  }
}

template <class C>
int start_fused(const Backward& b, void* stream) {
  const Problem& p = b.p;
  const auto s = static_cast<cudaStream_t>(stream);
  const int low = p.window > 0 ? (p.start - p.window + 1 > 0 ? p.start - p.window + 1 : 0) : 0;
  const int base = low / C::BN * C::BN;
  const int64_t blocks = (static_cast<int64_t>(p.start) + p.n - base + C::BN - 1) / C::BN * p.kv_heads;
  const int64_t row_tiles = (static_cast<int64_t>(p.n) * p.group + C::BM - 1) / C::BM * p.kv_heads;
  if (const int error = allow_shared_memory(reinterpret_cast<const void*>(fused_kernel<C>), C::SMEM)) return error;
  if (const int error = cudaMemsetAsync(b.dq_sum, 0, static_cast<size_t>(row_tiles * C::BM * C::HD * 4), s)) return error;
  fused_kernel<C><<<static_cast<unsigned>(blocks), C::THREADS, C::SMEM, s>>>(b, base);
  if (const int error = cudaGetLastError()) return error;
  return launch(dq_kernel<C>, (row_tiles * (C::BM / 16) + 7) / 8, 256, 0, b, stream);
}

template <int HD, int MI, int WARPS, int CTAS, int WM>
int start(const Backward& b, void* stream) {
  using Even = Fused<HD, MI, WARPS, CTAS, WM, true>;
  return Even::EVEN && Even::STEP % b.p.group == 0 ? start_fused<Even>(b, stream) : start_fused<Fused<HD, MI, WARPS, CTAS, WM, false>>(b, stream);
}

}  // namespace

int64_t backward_fused_floats(const Problem& p) {
  if (p.window > 0 || p.dim > 64) return 0;
  return (static_cast<int64_t>(p.n) * p.group + kFusedRows - 1) / kFusedRows * kFusedRows * ((p.dim + 31) / 32 * 32) * p.kv_heads;
}

int backward_fused(const Backward& b, void* stream) { return b.p.dim <= 32 ? start<32, 2, 4, 2, 2>(b, stream) : start<64, 2, 4, 2, 2>(b, stream); }

}  // namespace attention::cuda
