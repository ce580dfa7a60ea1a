/* Branch-free f32 functions that the compiler vectorises inside a loop. */
#ifndef LCTX_MLP_VECTOR_MATH_H
#define LCTX_MLP_VECTOR_MATH_H
#include <bit>
#include <cstdint>

#define LCTX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define LCTX_INLINE static inline __attribute__((always_inline))

namespace lctx::mlp {

/* e^x, about 1 ulp; the argument is clamped to where the result is a normal number. NaN stays NaN. */
LCTX_INLINE float exp32(float x) {
  const float limited = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);
  const float rounder = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
  const float n = (limited * 1.44269504f + rounder) - rounder;
  float r = limited - n * 0.693359375f; /* ln 2 in two parts; the first is exact in the product */
  r = r + n * 2.12194440e-4f;
  /* Taylor to r^7: |r| <= 0.3466, next term < 6e-9. */
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t whole = static_cast<int32_t>(n == n ? n : 0.0f);
  return p * std::bit_cast<float>((whole + 127) << 23);
}

LCTX_INLINE float sigmoid32(float x) { return 1.0f / (1.0f + exp32(-x)); }

/* The standard normal distribution function. With z = |x| / sqrt 2 and t = 1 / (1 + z/2): erfc(z) = t exp(-z^2 + p(t)), where the polynomial p is a Chebyshev
 * fit of degree 9 over z in 0..9.6 (largest error of p: 4.6e-8). `density` is exp(-x^2 / 2). */
LCTX_INLINE float normal_cdf32(float x, float density) {
  const float z = (x < 0 ? -x : x) * 0.70710678118f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.1414411366f;
  p = p * t - 0.6617397070f;
  p = p * t + 1.1115944386f;
  p = p * t - 0.6358494759f;
  p = p * t - 0.1305330694f;
  p = p * t + 0.0281382669f;
  p = p * t + 0.0253990535f;
  p = p * t + 0.3885811865f;
  p = p * t + 0.9984048605f;
  p = p * t - 1.2654366493f;
  const float half = 0.5f * t * density * exp32(p);
  return x < 0 ? half : 1.0f - half;
}

}  // namespace lctx::mlp
#endif
