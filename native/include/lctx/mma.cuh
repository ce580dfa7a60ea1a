/* What kernels on mma.sync share (compute capability 8.0 and up): copies into shared memory, and 16 x 16 fragments of bf16 from it. */
#ifndef LCTX_MMA_CUH
#define LCTX_MMA_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lctx::warp {

__device__ __forceinline__ uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/* 16 bytes, of which `bytes` are read and the others become zeros. */
__device__ __forceinline__ void cp_async(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
/* 16 bytes; zeros unless `some`, and then nothing is read. */
__device__ __forceinline__ void cp_async_if(uint32_t dst, const void* src, bool some) {
  asm volatile("{\n.reg .pred none;\nsetp.eq.u32 none, %2, 0;\ncp.async.cg.shared.global.L2::128B [%0], [%1], 16, none;\n}\n" ::"r"(dst), "l"(src), "r"(static_cast<uint32_t>(some)) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/* All but the latest N groups have arrived. */
template <int N>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }

/* Four 8 x 8 matrices; every lane names a row of one. TRANS: as columns. */
template <bool TRANS = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
/* c += a b of 16 x 8 x 16. */
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
/* Four lanes hold two neighbouring columns of each of four 8-column blocks; afterwards lane l holds all eight columns of block l. */
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t s0 = __shfl_xor_sync(~0u, odd ? r[0] : r[1], 1), s1 = __shfl_xor_sync(~0u, odd ? r[2] : r[3], 1);
  (odd ? r[0] : r[1]) = s0;
  (odd ? r[2] : r[3]) = s1;
  const uint32_t t0 = __shfl_xor_sync(~0u, high ? r[0] : r[2], 2), t1 = __shfl_xor_sync(~0u, high ? r[1] : r[3], 2);
  (high ? r[0] : r[2]) = t0;
  (high ? r[1] : r[3]) = t1;
}

}  // namespace lctx::warp
#endif
