/* What Hopper's own instructions need (compute capability 9.0, target sm_90a): bulk tensor copies, mbarriers, warpgroup products, register reallocation.
 *
 * Device functions exist only while the compiler makes sm_90a code; a kernel's body that uses them stands in the same #if. Host code that launches such a kernel stands in
 * #ifdef LCTX_HOPPER, which the build defines when 90a is among its targets, and checks lctx::cuda::is_hopper().
 *
 * Source: NVIDIA, Parallel Thread Execution ISA 9.0, sections on mbarrier, cp.async.bulk.tensor, wgmma and setmaxnreg. */
#ifndef LCTX_HOPPER_CUH
#define LCTX_HOPPER_CUH
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lctx::cuda {

/* Whether the current device is a Hopper card. */
inline bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 && minor == 0;
}

/* Describes a bf16 array of up to 5 dimensions, innermost (contiguous) first, for copies of boxes of it. `strides`: bytes from one index to the next of dimensions 1 .. rank - 1,
 * multiples of 16; `x` 16-byte aligned; box extents at most 256, and the innermost at most the swizzle's bytes. What a copy reads outside the array is zeros; what it would write
 * there is dropped. Passed to kernels as a `const __grid_constant__ CUtensorMap`. Returns a cudaError_t; the driver's symbol is looked up, so that nothing links against it. */
inline int tensor_map(CUtensorMap* map, const void* x, int rank, const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                      CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B, CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                      CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    return e == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  uint64_t size[5];
  for (int i = 0; i < rank; i++) size[i] = sizes[i];
  const CUresult r = encode(map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(x), reinterpret_cast<const cuuint64_t*>(size), reinterpret_cast<const cuuint64_t*>(strides), box,
                            steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace lctx::cuda

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace lctx::hopper {

__device__ __forceinline__ uint32_t smem(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarriers: 8 bytes of shared memory each, named by their shared address. A wait for parity p returns once phase p (0, 1, 0, ...) is over. -----------------------------
__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory"); }
/* After the inits and before the barrier that lets other threads and the copy engine see them. */
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
/* One arrival, and `bytes` more for the copies to deliver before the phase can end. */
__device__ __forceinline__ void mbarrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
__device__ __forceinline__ bool mbarrier_try(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  while (!mbarrier_try(bar, parity)) {
  }
}

/* Makes this thread's ordinary writes to shared memory visible to the copy engine and the tensor cores; a barrier among the threads comes after it. */
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- named barriers: ids 1 .. 15 (0 is __syncthreads); `threads` counts who arrives or syncs, a multiple of 32. --------------------------------------------------------------
__device__ __forceinline__ void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- registers: by all warps of a warpgroup. Needs __launch_bounds__(threads, 1) or another cap on entry. ------------------------------------------------------------------
template <int N>
__device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- bulk tensor copies: by one thread. Coordinates innermost first; they may lie outside the array. ------------------------------------------------------------------------
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst), "l"(map), "r"(bar), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z)
               : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst), "l"(map), "r"(bar), "r"(x), "r"(y),
               "r"(z), "r"(w)
               : "memory");
}
/* Stores belong to bulk groups of the thread: bulk_commit, then bulk_wait_read before the shared memory is written again, bulk_wait before the kernel may rely on the result. */
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t src, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(src), "r"(x), "r"(y), "r"(z) : "memory");
}
/* The same between contiguous memory and shared memory: `bytes` a multiple of 16, both addresses 16-byte aligned. bulk_add adds f32 to f32, element by element, in no order. */
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, int bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void bulk_store(void* dst, uint32_t src, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_add(void* dst, uint32_t src, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
template <int N>
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }

// ---- shared memory by its shared address ---------------------------------------------------------------------------------------------------------------------------------
/* Four 8 x 8 blocks of 16 bits, transposed; lane l names a row of 16 bytes of block l / 8. */
__device__ __forceinline__ void stmatrix_trans(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ float2 load_shared(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

// ---- warpgroup products: d (64 x N, f32) = [d +] A (64 x 16, bf16) B (16 x N, bf16) ---------------------------------------------------------------------------------------
/* Descriptor of an operand in shared memory as copies with CU_TENSOR_MAP_SWIZZLE_128B leave it: rows of 128 bytes (64 bf16), 16-byte chunk c of row r at chunk c ^ (r & 7),
 * at a multiple of 1,024 bytes.
 * K-major (rows are m or n, columns k): the next 16 k are 32 bytes further (`desc + 2`); 64 more rows are 8,192 bytes further. `lead` is not read.
 * MN-major (rows are k, columns m or n; the trans flag of the product is 1): the next 16 k are 16 rows, 2,048 bytes, further (`desc + 128`); `lead` is the distance in bytes
 * between one block of 64 m or n and the next, not read where there is only one. */
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t lead = 16) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(lead >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}
/* Before the first product, and whenever registers of accumulators or of A were written by anything else. */
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Until at most N of this warp's committed groups are under way. Other warps of the warpgroup may be behind. */
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
/* Keeps the compiler from moving reads and writes of these registers across this point: after a wait, and before a fence. */
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(uint32_t (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i])::"memory");
}

/* Wgmma<N>::ss<TA, TB>(d, a, b, add): both operands by descriptor; Wgmma<N>::rs<TB>(d, a, b, add): A in registers. TA, TB: 1 where the operand is MN-major. add 0: d is overwritten.
 * Thread t of the warpgroup (warp w = t / 32, lane l) holds of d the rows 16 w + l / 4 + 8 h and columns 8 j + l % 4 * 2 + e in d[4 j + 2 h + e], and of A the same with
 * a[2 jk + h] = columns 8 jk + l % 4 * 2 and the next one, for jk = 0, 1. */
template <int N>
struct Wgmma;

#define LCTX_R8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LCTX_R16(i) LCTX_R8(i), LCTX_R8(i + 8)
#define LCTX_R32(i) LCTX_R16(i), LCTX_R16(i + 16)
#define LCTX_R64(i) LCTX_R32(i), LCTX_R32(i + 32)
#define LCTX_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LCTX_D16 LCTX_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LCTX_D24 LCTX_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define LCTX_D32 LCTX_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define LCTX_D40 LCTX_D32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define LCTX_D48 LCTX_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define LCTX_D56 LCTX_D48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define LCTX_D64 LCTX_D56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define LCTX_D72 LCTX_D64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define LCTX_D80 LCTX_D72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define LCTX_D88 LCTX_D80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define LCTX_D96 LCTX_D88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define LCTX_D104 LCTX_D96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define LCTX_D112 LCTX_D104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define LCTX_D120 LCTX_D112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define LCTX_D128 LCTX_D120 ", %120, %121, %122, %123, %124, %125, %126, %127"

/* N columns, REGISTERS = N / 2; P0 .. P4: the operand numbers after them. */
#define LCTX_WGMMA(N, STRING, OPERANDS, P0, P1, P2, P3, P4, P5, P6, P7)                                                                                                         \
  template <>                                                                                                                                                               \
  struct Wgmma<N> {                                                                                                                                                         \
    template <int TA, int TB>                                                                                                                                               \
    static __device__ __forceinline__ void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {                                                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" STRING "}, %" P0 ", %" P1 ", p, 1, 1, %" P3     \
                   ", %" P4 ";\n}"                                                                                                                                          \
                   : OPERANDS                                                                                                                                               \
                   : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));                                                                                                           \
    }                                                                                                                                                                       \
    template <int TB>                                                                                                                                                       \
    static __device__ __forceinline__ void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {                                                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" STRING "}, {%" P0 ", %" P1 ", %" P2 ", %" P3    \
                   "}, %" P4 ", p, 1, 1, %" P6 ";\n}"                                                                                                                       \
                   : OPERANDS                                                                                                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB));                                                                                \
    }                                                                                                                                                                       \
  };

#define LCTX_O8 LCTX_R8(0)
#define LCTX_O16 LCTX_R16(0)
#define LCTX_O24 LCTX_R16(0), LCTX_R8(16)
#define LCTX_O32 LCTX_R32(0)
#define LCTX_O40 LCTX_R32(0), LCTX_R8(32)
#define LCTX_O48 LCTX_R32(0), LCTX_R16(32)
#define LCTX_O56 LCTX_R32(0), LCTX_R16(32), LCTX_R8(48)
#define LCTX_O64 LCTX_R64(0)
#define LCTX_O72 LCTX_R64(0), LCTX_R8(64)
#define LCTX_O80 LCTX_R64(0), LCTX_R16(64)
#define LCTX_O88 LCTX_R64(0), LCTX_R16(64), LCTX_R8(80)
#define LCTX_O96 LCTX_R64(0), LCTX_R32(64)
#define LCTX_O104 LCTX_R64(0), LCTX_R32(64), LCTX_R8(96)
#define LCTX_O112 LCTX_R64(0), LCTX_R32(64), LCTX_R16(96)
#define LCTX_O120 LCTX_R64(0), LCTX_R32(64), LCTX_R16(96), LCTX_R8(112)
#define LCTX_O128 LCTX_R64(0), LCTX_R64(64)
LCTX_WGMMA(16, LCTX_D8, LCTX_O8, "8", "9", "10", "11", "12", "13", "14", "15")
LCTX_WGMMA(32, LCTX_D16, LCTX_O16, "16", "17", "18", "19", "20", "21", "22", "23")
LCTX_WGMMA(48, LCTX_D24, LCTX_O24, "24", "25", "26", "27", "28", "29", "30", "31")
LCTX_WGMMA(64, LCTX_D32, LCTX_O32, "32", "33", "34", "35", "36", "37", "38", "39")
LCTX_WGMMA(80, LCTX_D40, LCTX_O40, "40", "41", "42", "43", "44", "45", "46", "47")
LCTX_WGMMA(96, LCTX_D48, LCTX_O48, "48", "49", "50", "51", "52", "53", "54", "55")
LCTX_WGMMA(112, LCTX_D56, LCTX_O56, "56", "57", "58", "59", "60", "61", "62", "63")
LCTX_WGMMA(128, LCTX_D64, LCTX_O64, "64", "65", "66", "67", "68", "69", "70", "71")
LCTX_WGMMA(144, LCTX_D72, LCTX_O72, "72", "73", "74", "75", "76", "77", "78", "79")
LCTX_WGMMA(160, LCTX_D80, LCTX_O80, "80", "81", "82", "83", "84", "85", "86", "87")
LCTX_WGMMA(176, LCTX_D88, LCTX_O88, "88", "89", "90", "91", "92", "93", "94", "95")
LCTX_WGMMA(192, LCTX_D96, LCTX_O96, "96", "97", "98", "99", "100", "101", "102", "103")
LCTX_WGMMA(208, LCTX_D104, LCTX_O104, "104", "105", "106", "107", "108", "109", "110", "111")
LCTX_WGMMA(224, LCTX_D112, LCTX_O112, "112", "113", "114", "115", "116", "117", "118", "119")
LCTX_WGMMA(240, LCTX_D120, LCTX_O120, "120", "121", "122", "123", "124", "125", "126", "127")
LCTX_WGMMA(256, LCTX_D128, LCTX_O128, "128", "129", "130", "131", "132", "133", "134", "135")

}  // namespace lctx::hopper
#endif
#endif
