/* Copies with casts, fills, and element-wise row ops. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_kernels.h"
#include "rows.cuh"

namespace lctx::cuda {
namespace {

constexpr int THREADS = 256;
unsigned blocks(int64_t n) { return static_cast<unsigned>(std::min<int64_t>((n + THREADS - 1) / THREADS, 132 * 32)); }

__global__ void empty_kernel() {}

/* ---- copy ---- */
template <class T> __device__ __forceinline__ float to_float(T v) { return static_cast<float>(v); }
template <class To, class From>
__device__ __forceinline__ To convert(From v) {
  if constexpr (std::is_same_v<To, From>) return v;
  else if constexpr (std::is_same_v<To, __nv_bfloat16>) return __float2bfloat16(to_float(v));
  else if constexpr (std::is_same_v<To, __half>) return __float2half(to_float(v));
  else if constexpr (std::is_same_v<To, float>) return to_float(v);
  else {  // integers: truncate, saturate, NaN to 0
    double d;
    if constexpr (std::is_integral_v<From>) d = static_cast<double>(v);
    else d = static_cast<double>(to_float(v));
    constexpr double low = std::is_same_v<To, uint8_t> ? 0.0 : (sizeof(To) == 4 ? -2147483648.0 : -9223372036854775808.0);
    constexpr double high = std::is_same_v<To, uint8_t> ? 255.0 : (sizeof(To) == 4 ? 2147483647.0 : 9223372036854775807.0);
    if (!(d == d)) return 0;
    if (d <= low) return static_cast<To>(low);
    if (d >= high) return sizeof(To) == 8 ? static_cast<To>(0x7fffffffffffffffll) : static_cast<To>(high);
    return static_cast<To>(d);
  }
}

struct Strides {
  int ndim;
  int64_t shape[LCTX_MAX_DIMS], dst[LCTX_MAX_DIMS], src[LCTX_MAX_DIMS];
};
template <class To, class From>
__global__ void copy_kernel(To* dst, const From* src, int64_t n, Strides s) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; i < n; i += static_cast<int64_t>(gridDim.x) * THREADS) {
    int64_t rest = i, at_dst = 0, at_src = 0;
    for (int d = s.ndim - 1; d > 0; d--) {
      const int64_t index = rest % s.shape[d];
      rest /= s.shape[d];
      at_dst += index * s.dst[d];
      at_src += index * s.src[d];
    }
    dst[at_dst + rest * s.dst[0]] = convert<To, From>(src[at_src + rest * s.src[0]]);
  }
}
template <class To, class From>
int copy_typed(const cpu::CopyParams& p, cudaStream_t stream) {
  Strides s{};
  int64_t n = 1;
  for (int i = 0; i < p.ndim; i++) {
    n *= p.shape[i];
    if (p.shape[i] == 1) continue;
    if (s.ndim && s.dst[s.ndim - 1] == p.shape[i] * p.dst.strides[i] && s.src[s.ndim - 1] == p.shape[i] * p.src.strides[i]) s.shape[s.ndim - 1] *= p.shape[i];
    else s.shape[s.ndim++] = p.shape[i];
    s.dst[s.ndim - 1] = p.dst.strides[i];
    s.src[s.ndim - 1] = p.src.strides[i];
  }
  if (n == 0) return 0;
  if (s.ndim == 0) s = {1, {1}, {1}, {1}};
  copy_kernel<To, From><<<blocks(n), THREADS, 0, stream>>>(static_cast<To*>(p.dst.data), static_cast<const From*>(p.src.data), n, s);
  return cudaGetLastError();
}
template <class From>
int copy_from(const cpu::CopyParams& p, cudaStream_t s) {
  switch (p.dst.dtype) {
    case LCTX_F32: return copy_typed<float, From>(p, s);
    case LCTX_BF16: return copy_typed<__nv_bfloat16, From>(p, s);
    case LCTX_F16: return copy_typed<__half, From>(p, s);
    case LCTX_I32: return copy_typed<int32_t, From>(p, s);
    case LCTX_I64: return copy_typed<int64_t, From>(p, s);
    default: return copy_typed<uint8_t, From>(p, s);
  }
}

/* ---- rows: out = f(a, b, out) in f32 ---- */
enum class Op { add, add_bias, scale, axpy };
template <Op OP>
__device__ __forceinline__ float apply(float a, float b, float out, float alpha) {
  if (OP == Op::add) return a + b;
  if (OP == Op::add_bias) return out + b;
  if (OP == Op::scale) return out * alpha;
  return out + alpha * a;
}
template <Op OP>
__global__ void rows_kernel(RowsLaunch p) {
  const int64_t n = p.rows * p.width;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; i < n; i += static_cast<int64_t>(gridDim.x) * THREADS) {
    const int64_t r = i / p.width, c = i % p.width, at = r * p.out.ld + c;
    float a = 0, b = 0, out = 0;
    if (OP == Op::add || OP == Op::axpy) a = load_any(p.a, r * p.a.ld + c);
    if (OP == Op::add || OP == Op::add_bias) b = load_any(p.b, OP == Op::add ? r * p.b.ld + c : c);
    if (OP != Op::add) out = load_any(p.out, at);
    store_any(p.out, at, apply<OP>(a, b, out, p.alpha));
  }
}
/* Eight elements a thread; a block takes whole rows' pieces, so that no element needs a division. */
template <Op OP>
__global__ void rows8_kernel(RowsLaunch p) {
  const int64_t c = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 8;
  if (c >= p.width) return;
  for (int64_t r = blockIdx.y * static_cast<int64_t>(blockDim.y) + threadIdx.y; r < p.rows; r += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    float a[8] = {}, b[8] = {}, out[8] = {};
    if (OP == Op::add || OP == Op::axpy) load8(p.a, r * p.a.ld + c, a);
    if (OP == Op::add || OP == Op::add_bias) load8(p.b, OP == Op::add ? r * p.b.ld + c : c, b);
    if (OP != Op::add) load8(p.out, r * p.out.ld + c, out);
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = apply<OP>(a[j], b[j], out[j], p.alpha);
    store8(p.out, r * p.out.ld + c, out);
  }
}
template <Op OP>
int launch_rows(const RowsLaunch& given, void* stream) {
  RowsLaunch p = given;
  if (p.rows * p.width == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const bool flat = OP != Op::add_bias && p.out.ld == p.width && (OP == Op::scale || p.a.ld == p.width) && (OP != Op::add || p.b.ld == p.width);
  if (flat && p.width % 8 != 0 && p.rows * p.width % 8 == 0) {  // contiguous: how the rows fall does not matter
    p.width = p.a.ld = p.b.ld = p.out.ld = 8;
    p.rows = given.rows * given.width / 8;
  }
  const bool wide = vectors(p.out, p.width) && ((OP != Op::add && OP != Op::axpy) || vectors(p.a, p.width)) &&
                    (OP == Op::scale || OP == Op::axpy || (OP == Op::add ? vectors(p.b, p.width) : reinterpret_cast<uintptr_t>(p.b.data) % 16 == 0));
  if (!wide) {
    rows_kernel<OP><<<blocks(p.rows * p.width), THREADS, 0, s>>>(p);
    return cudaGetLastError();
  }
  const int64_t chunks = p.width / 8;
  int x = 1;
  while (x < chunks && x < THREADS) x *= 2;
  const dim3 threads(static_cast<unsigned>(x), static_cast<unsigned>(THREADS / x));
  const unsigned across = static_cast<unsigned>((chunks + x - 1) / x);
  const int64_t down = (p.rows + threads.y - 1) / threads.y;
  rows8_kernel<OP><<<dim3(across, static_cast<unsigned>(std::min<int64_t>(down, std::max<int64_t>(1, 132 * 16 / across)))), threads, 0, s>>>(p);
  return cudaGetLastError();
}

/* ---- the casts that training makes by the gigabyte: f32 <-> bf16, contiguous ---- */
__global__ void cast8_kernel(RowTensor dst, RowTensor src, int64_t chunks) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; i < chunks; i += static_cast<int64_t>(gridDim.x) * THREADS) {
    float v[8];
    load8(src, i * 8, v);
    store8(dst, i * 8, v);
  }
}
/* True when it was one of those; what 8 does not divide is left to copy_kernel. */
bool cast_contiguous(const cpu::CopyParams& p, cudaStream_t stream, int* status) {
  const auto half = [](int32_t a, int32_t b) { return a == LCTX_F32 && b == LCTX_BF16; };
  if (!half(p.src.dtype, p.dst.dtype) && !half(p.dst.dtype, p.src.dtype)) return false;
  int64_t n = 1;
  for (int i = p.ndim - 1; i >= 0; i--) {
    if (p.shape[i] != 1 && (p.src.strides[i] != n || p.dst.strides[i] != n)) return false;
    n *= p.shape[i];
  }
  const RowTensor dst{p.dst.data, p.dst.dtype, 8}, src{p.src.data, p.src.dtype, 8};
  if (n == 0 || n % 8 != 0 || !vectors(dst, 8) || !vectors(src, 8)) return false;
  cast8_kernel<<<blocks(n / 8), THREADS, 0, stream>>>(dst, src, n / 8);
  *status = cudaGetLastError();
  return true;
}

}  // namespace

int probe_kernel_image() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, empty_kernel);
}

int launch_copy(const cpu::CopyParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  int status = 0;
  if (cast_contiguous(p, s, &status)) return status;
  switch (p.src.dtype) {
    case LCTX_F32: return copy_from<float>(p, s);
    case LCTX_BF16: return copy_from<__nv_bfloat16>(p, s);
    case LCTX_F16: return copy_from<__half>(p, s);
    case LCTX_I32: return copy_from<int32_t>(p, s);
    case LCTX_I64: return copy_from<int64_t>(p, s);
    default: return copy_from<uint8_t>(p, s);
  }
}

int launch_add(const RowsLaunch& p, void* stream) { return launch_rows<Op::add>(p, stream); }
int launch_add_bias(const RowsLaunch& p, void* stream) { return launch_rows<Op::add_bias>(p, stream); }
int launch_scale(const RowsLaunch& p, void* stream) { return launch_rows<Op::scale>(p, stream); }
int launch_axpy(const RowsLaunch& p, void* stream) { return launch_rows<Op::axpy>(p, stream); }

}  // namespace lctx::cuda
