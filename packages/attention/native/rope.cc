#include <cmath>
#include "rope.h"

#if defined(__x86_64__)
#define LC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LC_CLONES
#endif

namespace attention {
namespace {

/* cos and sin of position * inv_freq, times factor. An f32 angle is off by 0.03 rad at position 2^19. Here the angle is a product of f64 values kept
 * exactly, as a sum of two, and n * pi/2 is taken off in two fused steps (106 bits of pi/2): what is left is the f32 result's own rounding, at any
 * position that a sequence can have. */
LC_CLONES void angles(double position, const double* inv_freq, int64_t pairs, double factor, float* __restrict cos_out, float* __restrict sin_out) {
  constexpr double kTwoOverPi = 0.63661977236758134308, kHalfPiHigh = 1.57079632679489661923, kHalfPiLow = 6.123233995736766035868820147292e-17;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, which lies in the low bits
  for (int64_t j = 0; j < pairs; j++) {
    const double angle = position * inv_freq[j];
    const double shifted = angle * kTwoOverPi + kRound;
    const double n = shifted - kRound;
    const double rest = __builtin_fma(position, inv_freq[j], -angle);  // what rounding took from the angle
    double r = __builtin_fma(-n, kHalfPiHigh, angle);
    r = __builtin_fma(-n, kHalfPiLow, r) + rest;
    const double z = r * r;
    // Taylor series; on [-pi/4, pi/4] the first terms left out are below 1e-11.
    const double s = r * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800))))));
    const double c = 1 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
    int64_t quadrant;
    static_assert(sizeof quadrant == sizeof shifted);
    __builtin_memcpy(&quadrant, &shifted, sizeof quadrant);
    const bool swap = quadrant & 1;
    const double cosine = swap ? s : c, sine = swap ? c : s;
    cos_out[j] = static_cast<float>(((quadrant + 1) & 2 ? -cosine : cosine) * factor);
    sin_out[j] = static_cast<float>((quadrant & 2 ? -sine : sine) * factor);
  }
}

LC_CLONES void rotate(float* __restrict x, int64_t heads, int64_t dim, int64_t pairs, const float* __restrict c, const float* __restrict s) {
  for (int64_t h = 0; h < heads; h++, x += dim) {
#pragma GCC ivdep
    for (int64_t j = 0; j < pairs; j++) {
      const float a = x[j], b = x[j + pairs];
      x[j] = a * c[j] - b * s[j];
      x[j + pairs] = b * c[j] + a * s[j];
    }
  }
}

}  // namespace

void rope(const Rope& r, const lctx_api* api) {
  struct Context { const Rope* r; } context{&r};
  api->parallel_for(0, r.n, 32, [](void* ctx, int64_t begin, int64_t end) {
    const Rope& p = *static_cast<Context*>(ctx)->r;
    alignas(64) float c[kMaxPairs], s[kMaxPairs];
    for (int64_t i = begin; i < end; i++) {
      angles(static_cast<double>(p.start + i - (p.doc_start ? p.doc_start[i] : 0)), p.inv_freq, p.pairs, p.factor, c, s);
      if (p.transpose) for (int64_t j = 0; j < p.pairs; j++) s[j] = -s[j];
      rotate(p.x + i * p.stride, p.heads, p.dim, p.pairs, c, s);
    }
  }, &context);
}

}  // namespace attention
