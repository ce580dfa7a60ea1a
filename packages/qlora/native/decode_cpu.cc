/* 4-bit codes -> floats: a 16-entry table lives in one AVX-512 register (or two of AVX2), so a lookup is one or two permutes. */
// GCC 12's AVX-512 headers warn about their own undefined placeholders.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "convert.h"
#include "quant.h"

namespace lc_qlora {
namespace {

void decode_plain(const uint8_t* codes, int64_t n, const float* table, float scale, bool high_first, float* out) {
  const int first = high_first ? 4 : 0;
  for (int64_t i = 0; i < n; i++) out[i] = table[(codes[i >> 1] >> (i & 1 ? 4 - first : first)) & 15] * scale;
}

__attribute__((target("avx512f"))) void decode_avx512(const uint8_t* codes, int64_t n, const float* table, float scale, bool high_first, float* out) {
  const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
  const __m512i low_half = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high_half = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m512 low = _mm512_permutexvar_ps(bytes, values);  // reads only the low four bits of an index
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values);
    const __m512 a = high_first ? high : low, b = high_first ? low : high;
    _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(a, low_half, b));
    _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(a, high_half, b));
  }
  decode_plain(codes + i / 2, n - i, table, scale, high_first, out + i);
}

__attribute__((target("avx2"))) inline __m256 lookup(__m256i index, __m256 below, __m256 above) {
  const __m256 lo = _mm256_permutevar8x32_ps(below, index), hi = _mm256_permutevar8x32_ps(above, index);
  return _mm256_blendv_ps(lo, hi, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 chooses
}

__attribute__((target("avx2"))) void decode_avx2(const uint8_t* codes, int64_t n, const float* table, float scale, bool high_first, float* out) {
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 below = _mm256_mul_ps(_mm256_loadu_ps(table), factor), above = _mm256_mul_ps(_mm256_loadu_ps(table + 8), factor);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m256 low = lookup(bytes, below, above), high = lookup(_mm256_srli_epi32(bytes, 4), below, above);
    const __m256 a = high_first ? high : low, b = high_first ? low : high;
    const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    _mm256_storeu_ps(out + i, _mm256_permute2f128_ps(even, odd, 0x20));
    _mm256_storeu_ps(out + i + 8, _mm256_permute2f128_ps(even, odd, 0x31));
  }
  decode_plain(codes + i / 2, n - i, table, scale, high_first, out + i);
}

using Decode = void (*)(const uint8_t*, int64_t, const float*, float, bool, float*);
Decode choose() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return decode_avx512;
  if (__builtin_cpu_supports("avx2")) return decode_avx2;
  return decode_plain;
}
const Decode kDecode = choose();

}  // namespace

__attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"))) void narrow(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i++) out[i] = to_bf16(x[i]);
}

void decode4(const uint8_t* codes, int64_t n, const float* table, float scale, bool high_first, float* out) {
  kDecode(codes, n, table, scale, high_first, out);
}

}  // namespace lc_qlora
