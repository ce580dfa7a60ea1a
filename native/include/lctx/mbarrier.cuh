/* mbarriers from compute capability 8.0 up: 8 bytes of shared memory each, named by their shared address. A wait for parity p returns once phase p (0, 1, 0, ...) is over; for
 * parity 1 a new one passes at once. lctx/hopper.cuh has what only Hopper can.
 * Source: NVIDIA, Parallel Thread Execution ISA 9.0, sections on mbarrier and cp.async.mbarrier.arrive. */
#ifndef LCTX_MBARRIER_CUH
#define LCTX_MBARRIER_CUH
#include <cstdint>

namespace lctx::warp {

__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t arrivals) { asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(bar), "r"(arrivals) : "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) { asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(bar) : "memory"); }
/* This thread arrives once all copies (cp.async) that it has asked for are there. */
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];\n" ::"r"(bar) : "memory"); }
__device__ __forceinline__ bool mbarrier_try(uint32_t bar, uint32_t parity) {
  uint32_t done;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
#else
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
#endif
  return done;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  while (!mbarrier_try(bar, parity)) {
  }
}

}  // namespace lctx::warp
#endif
