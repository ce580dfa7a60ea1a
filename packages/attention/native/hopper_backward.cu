/* Which problems Hopper's backward takes, its launches, and the small kernels before and after it. */
#include "hopper_backward.cuh"

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

/* lse and delta by head, padded to whole tiles with rows of probability 0. */
__global__ void rows_kernel(const float* lse, const float* delta, float* lse_out, float* delta_out, int n, int heads, int padded) {
  __shared__ float tile[2][32][33];
  const int query0 = static_cast<int>(blockIdx.x) * 32, head0 = static_cast<int>(blockIdx.y) * 32;
  for (int y = threadIdx.y; y < 32; y += 8) {
    const int query = query0 + y, head = head0 + static_cast<int>(threadIdx.x);
    const bool valid = query < n && head < heads;
    const int64_t at = static_cast<int64_t>(query) * heads + head;
    tile[0][y][threadIdx.x] = valid ? lse[at] * kLog2e : INFINITY;
    tile[1][y][threadIdx.x] = valid ? delta[at] : 0;
  }
  __syncthreads();
  for (int y = threadIdx.y; y < 32; y += 8) {
    const int query = query0 + static_cast<int>(threadIdx.x), head = head0 + y;
    if (query >= padded || head >= heads) continue;
    lse_out[static_cast<int64_t>(head) * padded + query] = tile[0][threadIdx.x][y];
    delta_out[static_cast<int64_t>(head) * padded + query] = tile[1][threadIdx.x][y];
  }
}

/* Per tile of queries the first tile of keys, made non-decreasing whatever doc_start holds: the turns rely on it. */
__global__ void __launch_bounds__(1024) low_kernel(const __grid_constant__ Problem p, int* low, int tiles, int queries) {
  __shared__ int most[1024];
  const int each = (tiles + 1023) / 1024, begin = static_cast<int>(threadIdx.x) * each, end = min(tiles, begin + each);
  int top = 0;
  for (int i = begin; i < end; i++) top = max(top, first_key(p, i * queries) / kKeys);
  most[threadIdx.x] = top;
  __syncthreads();
  for (int step = 1; step < 1024; step *= 2) {  // prefix maximum (Hillis and Steele 1986)
    const int other = static_cast<int>(threadIdx.x) >= step ? most[threadIdx.x - step] : 0;
    __syncthreads();
    most[threadIdx.x] = max(most[threadIdx.x], other);
    __syncthreads();
  }
  top = threadIdx.x > 0 ? most[threadIdx.x - 1] : 0;
  for (int i = begin; i < end; i++) {
    top = max(top, first_key(p, i * queries) / kKeys);
    low[i] = top;
  }
}

/* dQ from the order of the accumulators of 64 rows, times scale, as bf16. A thread: 8 columns of rows r and r + 8. */
template <int HD>
__global__ void __launch_bounds__(256) dq_kernel(const float* sum, bf16* dq, int64_t stride, int n, int tiles, int dim, float scale) {
  const int tile = blockIdx.x, head = blockIdx.y;
  const float4* from = reinterpret_cast<const float4*>(sum + (static_cast<int64_t>(head) * tiles + tile) * 64 * HD);
#pragma unroll
  for (int x0 = 0; x0 < HD / 8 * 32; x0 += 256) {
    const int x = x0 + static_cast<int>(threadIdx.x), chunk = x % (HD / 8), pair = x / (HD / 8), row = pair / 8 * 16 + pair % 8, query = tile * 64 + row;
    if (chunk * 8 >= dim) continue;
    uint32_t upper[4], lower[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float4 v = from[chunk * 128 + pair * 4 + i];
      upper[i] = pack(v.x * scale, v.y * scale);
      lower[i] = pack(v.z * scale, v.w * scale);
    }
    bf16* to = dq + query * stride + static_cast<int64_t>(head) * dim + chunk * 8;
    if (query < n) *reinterpret_cast<uint4*>(to) = make_uint4(upper[0], upper[1], upper[2], upper[3]);
    if (query + 8 < n) *reinterpret_cast<uint4*>(to + 8 * stride) = make_uint4(lower[0], lower[1], lower[2], lower[3]);
  }
}

/* Tiles of keys of one K/V head that blocks take before they turn to the next head. Many keep that head's Q, dO and dQ in the L2 cache. But the dearest keys of the last head come late then,
 * unless a head has keys for almost two rounds of blocks; and in order the blocks of a row start one behind the other. Behind a window there is nothing to keep. */
int keys_in_a_row(const Problem& p, int64_t key_tiles, int processors) {
  if (p.window > 0) return 1;
  return static_cast<int>(key_tiles * 4 >= int64_t{7} * processors ? key_tiles : std::max<int64_t>(1, key_tiles / 8));
}

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
  const auto map = [&](CUtensorMap* to, const void* x, int64_t stride, int heads, int64_t count, uint32_t tile) {
    const auto u = [](int64_t y) { return static_cast<uint64_t>(y); };
    const uint64_t sizes[3] = {u(p.dim), u(heads), u(count)}, strides[2] = {u(p.dim) * 2, u(stride) * 2};
    const uint32_t box[3] = {64, 1, tile};
    return lctx::cuda::tensor_map(to, x, 3, sizes, strides, box);
  };
  if (const int e = map(&a.q, p.q, p.q_stride, p.heads, p.n, C::M)) return e;
  if (const int e = map(&a.dout, b.dout, b.dout_stride, p.heads, p.n, C::M)) return e;
  if (const int e = map(&a.k, p.k, p.k_stride, p.kv_heads, keys, kKeys)) return e;
  if (const int e = map(&a.v, p.v, p.v_stride, p.kv_heads, keys, kKeys)) return e;
  if (const int e = cudaMemsetAsync(a.turn, 0, (rows / C::M + 1) * 4, s)) return e;
  if (!C::ORDERED)
    if (const int e = cudaMemsetAsync(a.dq_sum, 0, rows * C::HD * 4, s)) return e;
  rows_kernel<<<dim3(a.tiles * (C::M / 32), (p.heads + 31) / 32), dim3(32, 8), 0, s>>>(b.lse, b.delta, lse, delta, p.n, p.heads, a.tiles * C::M);
  low_kernel<<<1, 1024, 0, s>>>(p, low, a.tiles, C::M);
  const int64_t key_tiles = (keys + kKeys - 1) / kKeys - a.first_tile;
  int device = 0, processors = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  a.run = keys_in_a_row(p, key_tiles, processors);
  const int64_t blocks = round_up(key_tiles, a.run) * p.kv_heads;
  if (const int e = launch(hopper_backward_kernel<C>, blocks, C::THREADS, C::SMEM, a, stream)) return e;
  const int pieces = a.tiles * (C::M / 64);
  dq_kernel<C::HD><<<dim3(pieces, p.heads), 256, 0, s>>>(a.dq_sum, static_cast<bf16*>(b.dq), b.dq_stride, p.n, pieces, p.dim, p.scale);
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
  if (const int error = backward_delta(b, stream)) return error;
  // Behind a window few additions meet, and the first of a tile stores: order costs less than clearing dQ.
  return b.ordered || b.p.window > 0 ? run<true>(b, stream) : run<false>(b, stream);
}
#else
const char* hopper_backward_refuses(const Backward&) { return "this build has no code for Hopper cards (target 90a)"; }
bool hopper_card() { return false; }
int hopper_backward(const Backward&, void*) { return cudaErrorNotSupported; }
#endif

}  // namespace attention::cuda
