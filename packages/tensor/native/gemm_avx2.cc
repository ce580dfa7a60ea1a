#include "gemm_micro.h"
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma")

namespace lctx::cpu {
namespace {

alignas(32) constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Vec {
  using type = __m256;
  static constexpr int kWidth = 8;
  static __m256i mask(int32_t n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n)); }
  static type zero() { return _mm256_setzero_ps(); }
  static type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static type load(const float* p) { return _mm256_loadu_ps(p); }
  static type load(const float* p, int32_t n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  static void store(float* p, type v, int32_t n) { _mm256_maskstore_ps(p, mask(n), v); }
  static type mul(type a, type b) { return _mm256_mul_ps(a, b); }
  static type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
};
#include "gemm_kernels.h"
#include "gemm_pack_x86.h"

}  // namespace

/* 12 accumulators, two vectors of b and a broadcast: 15 of 16 registers. */
constinit const Micro kMicroAvx2{6, Vec::kWidth, LCTX_TABLE(6), pack_transposed, pack_straight};

}  // namespace lctx::cpu
#endif
