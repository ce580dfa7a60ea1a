/* bf16 rows eight elements at a time: 16-byte loads and stores. */
#ifndef LCTX_TILED_MLP_VECTORS_CUH
#define LCTX_TILED_MLP_VECTORS_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "lctx/device_rows.cuh"
#include "lctx/device_rows.h"

namespace lctx::mlp::cuda {

constexpr int THREADS = 256;
inline unsigned blocks(int64_t n) { return static_cast<unsigned>(std::min<int64_t>((n + THREADS - 1) / THREADS, 132 * 32)); }
#define LCTX_GRID_STRIDE(i, n) \
  for (int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x; i < (n); i += static_cast<int64_t>(gridDim.x) * THREADS)

__device__ __forceinline__ void unpack(const uint4& x, float* v) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ uint4 pack(const float* v) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ uint4* eight(const DeviceRows& t, int64_t i) { return reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(t.data) + i); }

/* Eight of a small operand that may be f32: a bias. */
__device__ __forceinline__ void load8(const DeviceRows& t, int64_t i, float* v) {
  if (t.dtype == LCTX_F32) {
    const float4* at = reinterpret_cast<const float4*>(static_cast<const float*>(t.data) + i);
    const float4 x = __ldg(at), y = __ldg(at + 1);
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w, v[4] = y.x, v[5] = y.y, v[6] = y.z, v[7] = y.w;
  } else {
    unpack(__ldg(eight(t, i)), v);
  }
}

/* Division by a number that is fixed for a launch, of numbers below 2^31. */
struct Divide {
  uint32_t by, multiplier, shift;
  explicit Divide(uint32_t d) : by(d), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < d) shift++;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

/* Whether every row can be taken eight elements at a time; rows that are absent can. */
inline bool vectors(const DeviceRows& t) {
  return t.data == nullptr || (t.ld % 8 == 0 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0);
}
inline bool vectors_bf16(const DeviceRows& t) { return vectors(t) && (t.data == nullptr || t.dtype == LCTX_BF16); }
/* How many there are: one thread each. */
inline uint32_t eights(int64_t rows, int64_t width) { return static_cast<uint32_t>(rows * (width / 8)); }
inline unsigned blocks8(uint32_t count) { return (count + THREADS - 1) / THREADS; }
/* Below 2^31 of them, so that they can be counted in 32 bits. */
inline bool countable(int64_t rows, int64_t width) { return width % 8 == 0 && rows * (width / 8) < (int64_t{1} << 31); }

}  // namespace lctx::mlp::cuda
#endif
