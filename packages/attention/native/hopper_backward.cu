/* Which problems Hopper's backward takes, its launches, and the small kernels before and after it. */
#include "hopper_backward.cuh"
#include "hopper_map.cuh"
#include "lctx/multiprocessors.h"

#include <algorithm>

namespace attention::cuda {

namespace {

[[maybe_unused]] constexpr int kKeys = 128; /* of a tile */
constexpr int queries_of(int dim) { return dim <= 64 ? 128 : 64; }

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace

/* dq_sum; lse and delta by head; low; turn; ticket: see HopperBackward. */
int64_t hopper_backward_floats(const Problem& p) {
  if (hopper_backward_window_takes(p)) return 0;
  const int64_t queries = queries_of(p.dim), tiles = (p.n + queries - 1) / queries, rows = p.heads * tiles * queries;
  return rows * (p.dim <= 64 ? 64 : 128) + 2 * rows + round_up(tiles, 4) + p.heads * tiles + 1;
}

#ifdef LCTX_HOPPER
namespace {

/* In which order blocks take tiles of keys: see HopperBackward. Some of one K/V head in a row keep what they share of its Q, dO and dQ in the L2 cache, and all of them where a head has
 * work for several rounds of blocks; but blocks of a row wait for one another, and the dearest keys of the last head come late. So the last tiles, as many as there are multiprocessors,
 * come one a head, cheapest last, unless they are much of the work. Behind a window there is nothing to keep. */
struct KeyOrder {
  int run, rows_end;
  KeyOrder(const Problem& p, int64_t key_tiles, int processors) {
    const int64_t last = processors / p.kv_heads, rest = key_tiles - (last * 4 <= key_tiles ? last : 0);
    const int64_t row = p.window > 0 ? 1 : key_tiles > int64_t{4} * processors ? rest : std::clamp<int64_t>(key_tiles / 8, 1, 8);
    run = static_cast<int>(row);
    rows_end = static_cast<int>(rest / row * row);
  }
};

template <bool ORDERED>
struct BackwardDims {
  using Dim64 = HopperBackwardConfig<128, 64, 2, 2, ORDERED>;
  using Dim128 = HopperBackwardConfig<64, 128, 2, 2, ORDERED>;
};
constexpr int kBackwardSmem64 = BackwardDims<true>::Dim64::SMEM, kBackwardSmem128 = BackwardDims<true>::Dim128::SMEM;

template <class C>
int start(const Backward& b, void* stream) {
  static_assert(C::M == queries_of(C::HD) && C::N == kKeys);
  const Problem& p = b.p;
  const auto s = static_cast<cudaStream_t>(stream);
  HopperBackward a{};
  a.p = p, a.dk = b.dk, a.dv = b.dv, a.dk_stride = b.dk_stride, a.dv_stride = b.dv_stride;
  a.tiles = (p.n + C::M - 1) / C::M;
  const int64_t rows = static_cast<int64_t>(p.heads) * a.tiles * C::M, keys = static_cast<int64_t>(p.start) + p.n;
  float *lse = b.hopper + rows * C::HD, *delta = lse + rows;
  int* low = reinterpret_cast<int*>(delta + rows);
  a.dq_sum = b.hopper, a.lse = lse, a.delta = delta, a.low = low;
  a.turn = low + round_up(a.tiles, 4);
  a.ticket = a.turn + rows / C::M;
  a.first_tile = p.window > 0 ? std::max(0, p.start + 1 - p.window) / kKeys : 0;
  if (const int e = token_map(&a.q, p.q, p.n, p.heads, p.dim, p.q_stride, C::M)) return e;
  if (const int e = token_map(&a.dout, b.dout, p.n, p.heads, p.dim, b.dout_stride, C::M)) return e;
  if (const int e = token_map(&a.k, p.k, keys, p.kv_heads, p.dim, p.k_stride, kKeys)) return e;
  if (const int e = token_map(&a.v, p.v, keys, p.kv_heads, p.dim, p.v_stride, kKeys)) return e;
  if (!C::ORDERED)
    if (const int e = cudaMemsetAsync(a.dq_sum, 0, rows * C::HD * 4, s)) return e;
  const BackwardPrepare prepare{b, lse, delta, low, a.turn, rows / C::M + 1, a.tiles, C::M, kKeys};
  prepare_kernel<<<dim3(kSinkParts + 1, (p.heads + kPrepareHeads - 1) / kPrepareHeads), 256, 0, s>>>(prepare);
  if (const int e = cudaGetLastError()) return e;
  if (b.dsinks != nullptr) a.sink_partial = b.sink_partial, a.dsinks = b.dsinks;
  const int64_t key_tiles = (keys + kKeys - 1) / kKeys - a.first_tile;
  int processors = 0;
  if (const int e = lctx::cuda::multiprocessors(&processors)) return e;
  const KeyOrder order(p, key_tiles, processors);
  a.run = order.run, a.rows_end = order.rows_end;
  if (C::ORDERED) a.dq = static_cast<bf16*>(b.dq), a.dq_stride = b.dq_stride;
  const int64_t blocks = key_tiles * p.kv_heads;
  if (const int e = launch(hopper_backward_kernel<C>, blocks, C::THREADS, C::SMEM, a, stream)) return e;
  if (C::ORDERED) return 0;
  const int pieces = a.tiles * (C::M / 64);
  dq_kernel<C::HD><<<dim3(pieces, p.heads), 128, 0, s>>>(a.dq_sum, static_cast<bf16*>(b.dq), b.dq_stride, p.n, pieces, p.dim, p.scale);
  return cudaGetLastError();
}

template <bool ORDERED>
int run(const Backward& b, void* stream) {
  return b.p.dim <= 64 ? start<typename BackwardDims<ORDERED>::Dim64>(b, stream) : start<typename BackwardDims<ORDERED>::Dim128>(b, stream);
}

}  // namespace

const char* hopper_backward_refuses(const Backward& b) {
  const Problem& p = b.p;
  if (!lctx::cuda::is_hopper()) return "the card is not of compute capability 9.0";
  if (p.dim > 128) return "the head dim is beyond 128";
  if (p.heads > 65535) return "there are too many heads";
  for (const int64_t stride : {p.q_stride, p.k_stride, p.v_stride, b.out_stride, b.dout_stride})
    if (stride < int64_t{p.dim} || stride * 2 >= int64_t{1} << 40) return "rows overlap, or are too far apart for bulk tensor copies";
  const int bytes = hopper_backward_window_takes(p) ? kHopperWindowSmem : p.dim <= 64 ? kBackwardSmem64 : kBackwardSmem128;
  if (lctx::cuda::shared_memory_limit() < bytes) return "LCTX_SMEM_LIMIT leaves a block too little shared memory";
  return nullptr;
}

bool hopper_card() { return lctx::cuda::is_hopper(); }

int hopper_backward(const Backward& b, void* stream) {
  if (b.p.n == 0) return 0;
  if (hopper_backward_window_takes(b.p)) return hopper_backward_window(b, stream);
  // Behind a window few additions meet, and the first of a tile stores: order costs less than clearing dQ.
  return b.ordered || b.p.window > 0 ? run<true>(b, stream) : run<false>(b, stream);
}
#else
const char* hopper_backward_refuses(const Backward&) { return "this build has no code for Hopper cards (target 90a)"; }
bool hopper_card() { return false; }
int hopper_backward(const Backward&, void*) { return cudaErrorNotSupported; }
#endif

}  // namespace attention::cuda
