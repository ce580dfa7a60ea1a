/* For CPUs without AVX2, and the choice between the kernels. */
#include "gemm_micro.h"

#include <cstdlib>
#include <cstring>

namespace lctx::cpu {
namespace {

struct Vec {
  typedef float type __attribute__((vector_size(16)));
  typedef float unaligned __attribute__((vector_size(16), aligned(4), may_alias));
  static constexpr int kWidth = 4;
  static type zero() { return type{}; }
  static type broadcast(const float* p) { return type{*p, *p, *p, *p}; }
  static type load(const float* p) { return *reinterpret_cast<const unaligned*>(p); }
  static type load(const float* p, int32_t n) {
    type v{};
    for (int32_t i = 0; i < n; i++) v[i] = p[i];
    return v;
  }
  static void store(float* p, type v) { *reinterpret_cast<unaligned*>(p) = v; }
  static void store(float* p, type v, int32_t n) {
    for (int32_t i = 0; i < n; i++) p[i] = v[i];
  }
  static type mul(type a, type b) { return a * b; }
  static type fma(type a, type b, type c) { return a * b + c; }
};
#include "gemm_kernels.h"

void pack_transposed(const float* src, int64_t ld, int64_t rows, int64_t k, float* dst, int64_t stride) {
  for (int64_t p = 0; p < k; p++)
    for (int64_t i = 0; i < rows; i++) dst[p * stride + i] = src[i * ld + p];
}
void pack_straight(const float* src, int64_t ld, int64_t count, int64_t k, float* dst, int64_t stride) {
  for (int64_t p = 0; p < k; p++) std::memcpy(dst + p * stride, src + p * ld, static_cast<size_t>(count) * sizeof(float));
}

const Micro& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char* wish = std::getenv("LCTX_CPU_KERNELS");  // "avx2" or "portable": to test what this CPU would not choose
  const auto wants = [&](const char* name) { return !wish || std::strcmp(wish, name) == 0; };
  if (wants("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return kMicroAvx512;
  if (wants("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kMicroAvx2;
#endif
  return kMicroPortable;
}

}  // namespace

constinit const Micro kMicroPortable{4, Vec::kWidth, LCTX_TABLE(4), pack_transposed, pack_straight};

const Micro& micro() {
  static const Micro& chosen = choose();
  return chosen;
}

}  // namespace lctx::cpu
