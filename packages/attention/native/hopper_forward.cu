/* Which problems Hopper's forward takes, and its launches. */
#include "hopper_forward.cuh"

#include <algorithm>

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

template <class C>
int start(const Forward& f, bool flagged, void* stream) {
  const Problem& p = f.p;
  HopperForward a{};
  a.f = f;
  a.queries = C::BM / p.group;
  a.tiles = (p.n + a.queries - 1) / a.queries;
  a.flagged = flagged;
  const auto u = [](int64_t x) { return static_cast<uint64_t>(x); };
  const uint64_t q_sizes[3] = {C::HD, u(p.heads), u(p.n)}, k_sizes[3] = {C::HD, u(p.kv_heads), u(p.start) + u(p.n)};
  const uint32_t q_box[3] = {64, static_cast<uint32_t>(p.group), static_cast<uint32_t>(a.queries)}, k_box[3] = {64, 1, C::BN};
  const auto map = [](CUtensorMap* to, const void* x, const uint64_t* sizes, int64_t stride, const uint32_t* box) {
    const uint64_t strides[2] = {C::HD * 2, static_cast<uint64_t>(stride) * 2};  // bytes: [token, head, dim], heads packed
    return lctx::cuda::tensor_map(to, x, 3, sizes, strides, box);
  };
  if (const int e = map(&a.q, p.q, q_sizes, p.q_stride, q_box)) return e;
  if (const int e = map(&a.k, p.k, k_sizes, p.k_stride, k_box)) return e;
  if (const int e = map(&a.v, p.v, k_sizes, p.v_stride, k_box)) return e;
  int device = 0, processors = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  int64_t blocks = std::min<int64_t>(processors, static_cast<int64_t>(a.tiles) * p.kv_heads);
  if (flagged) {
    const int64_t most = kMaxFlags / p.kv_heads;  // tiles of one block
    blocks = std::max<int64_t>(std::min<int64_t>(processors, a.tiles), (a.tiles + most - 1) / most);
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
