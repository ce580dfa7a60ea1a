/* Which problems Hopper's forward takes, and its launches. */
#include "hopper_forward.cuh"
#include "hopper_map.cuh"
#include "lctx/multiprocessors.h"

#include <algorithm>
#include <atomic>

namespace attention::cuda {

#ifdef LCTX_HOPPER
namespace {

/* Long: many keys a query. Edge: windows, and the second launch after Long. */
struct Dim64 {
  using Long = HopperConfig<64, 3, 128, 4, 1, true, true, false>;
  using Edge = HopperConfig<64, 3, 80, 5, 2, false, false, false>;
};
struct Dim128 {
  using Long = HopperConfig<128, 3, 64, 4, 1, true, true, true>;
  using Edge = HopperConfig<128, 3, 64, 3, 2, false, false, true>;
};

/* Whether the keys and values of all heads pass out of the L2 cache before they are read again. */
int beyond_cache(const Problem& p, bool* beyond) {
  int device = 0, cache = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device)) return e;
  *beyond = (int64_t{p.start} + p.n) * p.kv_heads * p.dim * 4 > cache / 2;
  return 0;
}

/* Milestones are counted in memory of their own: a launch beside others on other streams should find one that is not in use; if two share one, only their pace suffers. */
constexpr unsigned kPaces = 16;
__device__ unsigned long long paces[kPaces];
int new_pace(unsigned long long** pace, void* stream) {
  static std::atomic<unsigned> launches{0};
  void* all = nullptr;
  if (const cudaError_t e = cudaGetSymbolAddress(&all, paces)) return e;
  *pace = static_cast<unsigned long long*>(all) + launches++ % kPaces;
  return cudaMemsetAsync(*pace, 0, sizeof **pace, static_cast<cudaStream_t>(stream));
}

/* How many items of a K/V head follow one another. A turn of the grid is whole runs of a few heads, and going to and fro then gives every block as much as any other; a run is short beside
 * all that a head has, so that the cheapest items come last. */
int32_t run_of(const Problem& p, int64_t blocks, int64_t tiles) {
  for (int64_t heads = 1; heads < p.kv_heads; heads++)
    if (blocks % heads == 0 && p.kv_heads % heads == 0 && tiles >= 4 * (blocks / heads)) return static_cast<int32_t>(blocks / heads);
  return 1;
}

template <class C>
int start(const Forward& f, bool flagged, void* stream) {
  const Problem& p = f.p;
  HopperForward a{};
  a.f = f;
  a.queries = C::BM / p.group;
  a.tiles = (p.n + a.queries - 1) / a.queries;
  a.flagged = flagged;
  const int64_t keys = static_cast<int64_t>(p.start) + p.n;
  if (const int e = token_map(&a.q, p.q, p.n, p.heads, C::HD, p.q_stride, a.queries, p.group)) return e;
  if (const int e = token_map(&a.k, p.k, keys, p.kv_heads, C::HD, p.k_stride, C::BN)) return e;
  if (const int e = token_map(&a.v, p.v, keys, p.kv_heads, C::HD, p.v_stride, C::BN)) return e;
  int processors = 0;
  if (const int e = lctx::cuda::multiprocessors(&processors)) return e;
  int64_t blocks = std::min<int64_t>(processors, static_cast<int64_t>(a.tiles) * p.kv_heads);
  if (flagged) {
    const int64_t most = kMaxFlags / p.kv_heads;  // tiles of one block
    blocks = std::max<int64_t>(std::min<int64_t>(processors, a.tiles), (a.tiles + most - 1) / most);
  }
  bool beyond = false;
  if (const int e = beyond_cache(p, &beyond)) return e;
  a.run = 1;
  if (C::FAST && beyond) {
    a.run = run_of(p, blocks, a.tiles);
    if (const int e = new_pace(&a.pace, stream)) return e;
  }
  return launch(hopper_forward_kernel<C>, blocks, C::THREADS, C::SMEM, a, stream);
}

template <class D>
int run(const Forward& f, void* stream) {
  if (f.p.n == 0) return 0;
  // A window of few keys is all edge.
  if (f.p.window > 0 && f.p.window <= 512) return start<typename D::Edge>(f, false, stream);
  if (const int e = start<typename D::Long>(f, false, stream)) return e;
  return D::Long::FAST ? start<typename D::Edge>(f, true, stream) : 0;
}

template <class D>
constexpr int kSharedBytes = std::max(D::Long::SMEM, D::Edge::SMEM);
template <class D>
constexpr int kMaxGroup = std::min(D::Long::BM, D::Edge::BM);

}  // namespace

const char* hopper_forward_refuses(const Problem& p) {
  if (!lctx::cuda::is_hopper()) return "the card is not of compute capability 9.0";
  if (p.dim != 64 && p.dim != 128) return "the head dim is neither 64 nor 128";
  if (p.group > (p.dim == 64 ? kMaxGroup<Dim64> : kMaxGroup<Dim128>)) return "too many query heads share a K/V head";
  if (p.kv_heads > kMaxFlags) return "there are too many K/V heads";
  if (!(p.scale >= 0)) return "the scale is negative";
  for (const int64_t stride : {p.q_stride, p.k_stride, p.v_stride})
    if (stride < int64_t{p.dim} || stride * 2 >= int64_t{1} << 40) return "rows overlap, or are too far apart for bulk tensor copies";
  if (lctx::cuda::shared_memory_limit() < (p.dim == 64 ? kSharedBytes<Dim64> : kSharedBytes<Dim128>)) return "LCTX_SMEM_LIMIT leaves a block too little shared memory";
  return nullptr;
}

int hopper_forward(const Forward& f, void* stream) { return f.p.dim == 64 ? run<Dim64>(f, stream) : run<Dim128>(f, stream); }
#else
const char* hopper_forward_refuses(const Problem&) { return "this build has no code for Hopper cards (target 90a)"; }
int hopper_forward(const Forward&, void*) { return cudaErrorNotSupported; }
#endif

}  // namespace attention::cuda
