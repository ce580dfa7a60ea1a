/* Loads and stores of DeviceRows inside kernels. */
#ifndef LCTX_DEVICE_ROWS_CUH
#define LCTX_DEVICE_ROWS_CUH
#include <cuda_bf16.h>
#include <cstdint>
#include "lctx/abi.h"

namespace lctx {

template <class Rows>
__device__ __forceinline__ float load_any(const Rows& t, int64_t i) {
  return t.dtype == LCTX_F32 ? static_cast<const float*>(t.data)[i] : __bfloat162float(static_cast<const __nv_bfloat16*>(t.data)[i]);
}
template <class Rows>
__device__ __forceinline__ void store_any(const Rows& t, int64_t i, float v) {
  if (t.dtype == LCTX_F32) static_cast<float*>(t.data)[i] = v;
  else static_cast<__nv_bfloat16*>(t.data)[i] = __float2bfloat16(v);
}

/* Sum over a block of at most 1,024 threads, the same for every thread, in a fixed order. */
__device__ __forceinline__ float block_sum_all(float v) {
  __shared__ float warps[32];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
  for (unsigned w = 0; w < (blockDim.x + 31) / 32; w++) sum += warps[w];
  return sum;
}

}  // namespace lctx
#endif
