/* Which problems Hopper's windowed backward takes, and its launches. */
#include "hopper_backward_window.cuh"
#include "hopper_map.cuh"
#include "lctx/multiprocessors.h"

#include <algorithm>

namespace attention::cuda {

namespace {

/* Keys that the last query sees, documents aside. */
int64_t window_of(const Problem& p) { return p.window > 0 ? p.window : static_cast<int64_t>(p.start) + p.n; }

}  // namespace

/* plan.ts says the same of shapes: such a pass takes no scratch. */
bool hopper_backward_window_takes(const Problem& p) { return p.dim <= 64 && p.group <= 64 && window_of(p) <= 129; }

#ifdef LCTX_HOPPER
namespace {

using Window = HopperWindowConfig<4, 144>;
constexpr int kBlock = 64; /* keys */
static_assert(Window::SMEM == kHopperWindowSmem);

/* Partial sums in the order of the spans. */
__global__ void window_sinks_kernel(const float* parts, float* dsinks, int count, int heads) {
  const int head = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (head >= heads) return;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < count; i++) sum += parts[static_cast<int64_t>(i) * heads + head];
  dsinks[head] -= sum;
}

/* Blocks of keys of a span: few spans repeat fewer queries, more fill the card. */
int64_t span_of(int64_t blocks, int64_t kv_heads, int64_t window, int64_t processors) {
  int64_t best = blocks, least = INT64_MAX;
  for (int64_t parts = 1; parts <= std::min<int64_t>(blocks, kSinkParts); parts++) {
    const int64_t span = (blocks + parts - 1) / parts, all = (blocks + span - 1) / span * kv_heads;
    const int64_t cost = (all + processors - 1) / processors * (span * kBlock + window + 64);  // 64: a block's start, in keys
    if (cost < least) least = cost, best = span;
  }
  return best;
}

}  // namespace

int hopper_backward_window(const Backward& b, void* stream) {
  const Problem& p = b.p;
  HopperWindow a{};
  a.p = p, a.dq = static_cast<bf16*>(b.dq), a.dk = b.dk, a.dv = b.dv, a.dq_stride = b.dq_stride, a.dk_stride = b.dk_stride, a.dv_stride = b.dv_stride, a.lse = b.lse;
  a.p.window = static_cast<int32_t>(window_of(p));
  a.sink_parts = b.dsinks != nullptr ? b.sink_partial : nullptr;
  while ((2 << a.shift) * p.group <= Window::M && 2 << a.shift <= kBlock) a.shift++;
  const int queries = 1 << a.shift;
  const int64_t keys = static_cast<int64_t>(p.start) + p.n;
  a.first_block = static_cast<int32_t>(std::max<int64_t>(0, int64_t{p.start} + 1 - a.p.window) / kBlock);
  a.end_block = static_cast<int32_t>((keys + kBlock - 1) / kBlock);
  int processors = 0;
  if (const int e = lctx::cuda::multiprocessors(&processors)) return e;
  const int64_t blocks = a.end_block - a.first_block;
  a.span = static_cast<int32_t>(span_of(blocks, p.kv_heads, a.p.window, processors));
  const int64_t parts = (blocks + a.span - 1) / a.span;
  if (const int e = token_map(&a.q, p.q, p.n, p.heads, p.dim, p.q_stride, queries, p.group)) return e;
  if (const int e = token_map(&a.dout, b.dout, p.n, p.heads, p.dim, b.dout_stride, queries, p.group)) return e;
  if (const int e = token_map(&a.out, b.out, p.n, p.heads, p.dim, b.out_stride, queries, p.group)) return e;
  if (const int e = token_map(&a.k, p.k, keys, p.kv_heads, p.dim, p.k_stride, kBlock)) return e;
  if (const int e = token_map(&a.v, p.v, keys, p.kv_heads, p.dim, p.v_stride, kBlock)) return e;
  if (const int e = launch(hopper_window_kernel<Window>, parts * p.kv_heads, Window::THREADS, Window::SMEM, a, stream)) return e;
  if (a.sink_parts == nullptr) return 0;
  window_sinks_kernel<<<(p.heads + 63) / 64, 64, 0, static_cast<cudaStream_t>(stream)>>>(b.sink_partial, b.dsinks, static_cast<int>(parts), p.heads);
  return cudaGetLastError();
}
#else
int hopper_backward_window(const Backward&, void*) { return cudaErrorNotSupported; }
#endif

}  // namespace attention::cuda
