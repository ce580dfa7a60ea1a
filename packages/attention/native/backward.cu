/* The small kernels of the backward pass, and its order. */
#include "tiles.cuh"

namespace attention::cuda {

namespace {

/* delta = rowsum(dout * out), one group of 8 lanes per (query, head). */
__global__ void __launch_bounds__(256) delta_kernel(const __grid_constant__ Backward b) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x / 8, count = static_cast<int64_t>(b.p.n) * b.p.heads;
  float sum = 0;
  if (at < count) {
    const int64_t query = at / b.p.heads, head = at - query * b.p.heads;
    const bf16* out = static_cast<const bf16*>(b.out) + query * b.out_stride + head * b.p.dim;
    const bf16* dout = static_cast<const bf16*>(b.dout) + query * b.dout_stride + head * b.p.dim;
    for (int x = threadIdx.x % 8 * 8; x < b.p.dim; x += 64) {
      const uint4 u = *reinterpret_cast<const uint4*>(out + x), w = *reinterpret_cast<const uint4*>(dout + x);
      const uint32_t a[4] = {u.x, u.y, u.z, u.w}, g[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum += __uint_as_float(a[i] << 16) * __uint_as_float(g[i] << 16);
        sum += __uint_as_float(a[i] & 0xffff0000u) * __uint_as_float(g[i] & 0xffff0000u);
      }
    }
  }
  for (int o = 4; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (at < count && threadIdx.x % 8 == 0) b.delta[at] = sum;
}

/* sum over queries of exp(sink - lse) * delta: parts of the queries first, then the parts, each in a fixed order. */
__global__ void sink_parts_kernel(const __grid_constant__ Backward b) {
  const int64_t n = b.p.n, begin = n * blockIdx.x / kSinkParts, end = n * (blockIdx.x + 1) / kSinkParts;
  for (int head = threadIdx.x; head < b.p.heads; head += blockDim.x) {
    const float sink = b.p.sinks[head] * kLog2e;
    float sum = 0;
    for (int64_t i = begin; i < end; i++) {
      const int64_t at = i * b.p.heads + head;
      sum += exp2f(sink - b.lse[at] * kLog2e) * b.delta[at];
    }
    b.sink_partial[static_cast<int64_t>(blockIdx.x) * b.p.heads + head] = sum;
  }
}
__global__ void sink_sum_kernel(const __grid_constant__ Backward b) {
  const int head = blockIdx.x * blockDim.x + threadIdx.x;
  if (head >= b.p.heads) return;
  float sum = 0;
  for (int part = 0; part < kSinkParts; part++) sum += b.sink_partial[static_cast<int64_t>(part) * b.p.heads + head];
  b.dsinks[head] -= sum;
}

}  // namespace

int backward_delta(const Backward& b, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t count = static_cast<int64_t>(b.p.n) * b.p.heads;
  if (const int error = launch(delta_kernel, (count + 31) / 32, 256, 0, b, stream)) return error;
  if (b.dsinks == nullptr) return 0;
  sink_parts_kernel<<<kSinkParts, 64, 0, s>>>(b);
  sink_sum_kernel<<<(b.p.heads + 63) / 64, 64, 0, s>>>(b);
  return cudaGetLastError();
}

int backward(const Backward& b, void* stream) {
  if (b.p.n == 0) return 0;
  if (const int error = backward_delta(b, stream)) return error;
  if (b.dq_sum != nullptr) return backward_fused(b, stream);
  if (const int error = backward_kv(b, stream)) return error;
  return backward_q(b, stream);
}

}  // namespace attention::cuda
