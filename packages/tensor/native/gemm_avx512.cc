#include "gemm_micro.h"
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")

namespace lctx::cpu {
namespace {

struct Vec {
  using type = __m512;
  static constexpr int kWidth = 16;
  static __mmask16 mask(int32_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static type zero() { return _mm512_setzero_ps(); }
  static type broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static type load(const float* p) { return _mm512_loadu_ps(p); }
  static type load(const float* p, int32_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, type v, int32_t n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static type mul(type a, type b) { return _mm512_mul_ps(a, b); }
  static type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
};
#include "gemm_kernels.h"
#include "gemm_pack_x86.h"

}  // namespace

/* 28 accumulators, two vectors of b and a broadcast operand: 31 of 32 registers. */
constinit const Micro kMicroAvx512{14, Vec::kWidth, LCTX_TABLE(14), pack_transposed, pack_straight};

}  // namespace lctx::cpu
#endif
