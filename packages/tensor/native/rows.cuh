/* Eight neighbouring elements at a time: 16-byte loads and stores of rows in f32 or bf16. */
#ifndef LCTX_ROWS_CUH
#define LCTX_ROWS_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace lctx::cuda {

__device__ __forceinline__ float load_any(const RowTensor& t, int64_t i) {
  return t.dtype == LCTX_F32 ? static_cast<const float*>(t.data)[i] : __bfloat162float(static_cast<const __nv_bfloat16*>(t.data)[i]);
}
__device__ __forceinline__ void store_any(const RowTensor& t, int64_t i, float v) {
  if (t.dtype == LCTX_F32) static_cast<float*>(t.data)[i] = v;
  else static_cast<__nv_bfloat16*>(t.data)[i] = __float2bfloat16(v);
}

/* i: a multiple of 8 from a row that `vectors` approved. */
__device__ __forceinline__ void load8(const RowTensor& t, int64_t i, float (&v)[8]) {
  if (t.dtype == LCTX_F32) {
    const float4* at = reinterpret_cast<const float4*>(static_cast<const float*>(t.data) + i);
    const float4 x = at[0], y = at[1];
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w, v[4] = y.x, v[5] = y.y, v[6] = y.z, v[7] = y.w;
  } else {
    const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(t.data) + i);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[2 * j] = __uint_as_float(words[j] << 16);
      v[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
  }
}
__device__ __forceinline__ void store8(const RowTensor& t, int64_t i, const float (&v)[8]) {
  if (t.dtype == LCTX_F32) {
    float4* at = reinterpret_cast<float4*>(static_cast<float*>(t.data) + i);
    at[0] = make_float4(v[0], v[1], v[2], v[3]);
    at[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
      words[j] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(t.data) + i) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

/* Whether every row of `t` can be taken eight elements at a time. */
inline bool vectors(const RowTensor& t, int64_t width) {
  return width % 8 == 0 && t.ld % 8 == 0 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

}  // namespace lctx::cuda
#endif
