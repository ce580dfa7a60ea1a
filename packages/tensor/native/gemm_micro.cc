#include "gemm_micro.h"

#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lctx::cpu {
namespace {

#define LCTX_INLINE inline __attribute__((always_inline))

/* c[MR, n] = alpha * a b + beta * c with MR x NV vector accumulators. `STRIDE` is the packed panel's row count (>= MR). */
template <class V, int NV, int MR, int STRIDE>
LCTX_INLINE void tile(const MicroArgs& p) {
  constexpr int W = sizeof(V) / sizeof(float);
  typedef V Unaligned __attribute__((aligned(4), may_alias));
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[i][v] = V{};
  const float* a = p.a;
  const float* b = p.b;
  for (int64_t k = 0; k < p.kc; k++) {
    V bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) bv[v] = *reinterpret_cast<const Unaligned*>(b + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const float s = a[i];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[i][v] += bv[v] * s;
    }
    a += STRIDE;
    b += NV * W;
  }
  if (p.n == NV * W) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      float* row = p.c + i * p.ldc;
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        Unaligned* at = reinterpret_cast<Unaligned*>(row + v * W);
        const V value = acc[i][v] * p.alpha;
        *at = p.beta == 0 ? value : value + *at * p.beta;  // beta 0 must not read c: it may hold NaN
      }
    }
  } else {
    alignas(64) float edge[NV * W];
    for (int i = 0; i < MR; i++) {
      for (int v = 0; v < NV; v++) *reinterpret_cast<Unaligned*>(edge + v * W) = acc[i][v] * p.alpha;
      float* row = p.c + i * p.ldc;
      for (int64_t j = 0; j < p.n; j++) row[j] = p.beta == 0 ? edge[j] : edge[j] + row[j] * p.beta;
    }
  }
}

typedef float V4 __attribute__((vector_size(16)));
template <int MR> void portable(const MicroArgs& p) { tile<V4, 2, MR, 4>(p); }
constexpr MicroFn kPortable[] = {portable<1>, portable<2>, portable<3>, portable<4>};

#if defined(__x86_64__)
typedef float V8 __attribute__((vector_size(32)));
typedef float V16 __attribute__((vector_size(64)));
template <int MR> __attribute__((target("avx2,fma"))) void avx2(const MicroArgs& p) { tile<V8, 2, MR, 6>(p); }
template <int MR> __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))) void avx512(const MicroArgs& p) { tile<V16, 2, MR, 14>(p); }
constexpr MicroFn kAvx2[] = {avx2<1>, avx2<2>, avx2<3>, avx2<4>, avx2<5>, avx2<6>};
constexpr MicroFn kAvx512[] = {avx512<1>, avx512<2>, avx512<3>,  avx512<4>,  avx512<5>,  avx512<6>,  avx512<7>,
                               avx512<8>, avx512<9>, avx512<10>, avx512<11>, avx512<12>, avx512<13>, avx512<14>};

/* 8 rows x 8 columns at a time through registers. */
__attribute__((target("avx2"))) void pack_avx2(const float* src, int64_t ld, int64_t rows, int64_t depth, float* dst, int64_t stride) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t r0 = 0; r0 < rows; r0 += 8) {
    const int valid = static_cast<int>(rows - r0 < 8 ? rows - r0 : 8);
    const __m256i store = _mm256_cmpgt_epi32(_mm256_set1_epi32(valid), lane);
    for (int64_t k0 = 0; k0 < depth; k0 += 8) {
      const int columns = static_cast<int>(depth - k0 < 8 ? depth - k0 : 8);
      const __m256i load = _mm256_cmpgt_epi32(_mm256_set1_epi32(columns), lane);
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        const float* row = src + (r0 + i) * ld + k0;
        r[i] = i >= valid ? _mm256_setzero_ps() : columns == 8 ? _mm256_loadu_ps(row) : _mm256_maskload_ps(row, load);
      }
      __m256 t[8];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        r[4 * i + 0] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
      }
      float* out = dst + k0 * stride + r0;
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        if (i >= columns) break;
        if (valid == 8) _mm256_storeu_ps(out + i * stride, t[i]);
        else _mm256_maskstore_ps(out + i * stride, store, t[i]);
      }
    }
  }
}
#endif

}  // namespace

const Micro& micro() {
  static const Micro chosen = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      return Micro{14, 32, kAvx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Micro{6, 16, kAvx2};
#endif
    return Micro{4, 8, kPortable};
  }();
  return chosen;
}

void pack_transposed(const float* src, int64_t ld, int64_t rows, int64_t depth, float* dst, int64_t stride) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return pack_avx2(src, ld, rows, depth, dst, stride);
#endif
  for (int64_t k = 0; k < depth; k++)
    for (int64_t r = 0; r < rows; r++) dst[k * stride + r] = src[r * ld + k];
}

}  // namespace lctx::cpu
