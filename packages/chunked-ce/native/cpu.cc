#include <algorithm>
#include <cmath>
#include <cstring>

#include "chunked_ce.h"
#include "lctx/napi_glue.h"

#define LCTX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace lctx::chunked_ce {
namespace {

constexpr int kLanes = 16;        // sums run in 16 f32 lanes, in a fixed order,
constexpr int64_t kBlock = 4096;  // which are folded into a double every so many columns: 201,088 words lose no digits

/* e^x for x <= 88: 2^n times a polynomial on [-ln2/2, ln2/2]; relative error about 1e-7. Below -87 it is 0, NaN stays NaN. */
inline float fast_exp(float x) {
  const float t = x * 1.44269504088896341f;
  const float n = std::nearbyintf(t > -126.0f ? (t < 127.0f ? t : 127.0f) : -126.0f);  // NaN becomes -126: the conversion below is defined
  const float r = std::fma(n, -1.42860677e-6f, std::fma(n, -0.693145752f, x));           // x - n ln2 in two parts; NaN again
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r + 1.0f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  const float y = p * scale;
  return x < -87.0f ? 0.0f : y;
}

/* Error below 3e-7 of the value: a polynomial in x^2 near 0 (where 1 - 2 / (e^2x + 1) cancels), that formula beyond. NaN stays NaN. */
inline float fast_tanh(float x) {
  const float a = std::fabs(x), s = x * x;
  float p = -5.70498872745e-3f;
  p = std::fma(p, s, 2.06390887954e-2f);
  p = std::fma(p, s, -5.37397155531e-2f);
  p = std::fma(p, s, 1.33314422036e-1f);
  p = std::fma(p, s, -3.33332819422e-1f);
  const float near = std::fma(p * s, x, x);
  const float far = std::copysign(1.0f - 2.0f / (fast_exp(a > 20.0f ? 40.0f : 2.0f * a) + 1.0f), x);
  return a < 0.625f ? near : far;
}

/* z of every column in place: scaled, capped. Returns the maximum, or NaN when any column is NaN or infinite before the cap. */
LCTX_CLONES float transform_row(float* z, const float* bias, float scale, float cap, int64_t n) {
  if (bias) {
    for (int64_t j = 0; j < n; j++) z[j] = (z[j] + bias[j]) * scale;
  } else if (scale != 1.0f) {
    for (int64_t j = 0; j < n; j++) z[j] *= scale;
  }
  // A comparison never picks a NaN up; a sum of x - x does, and infinities as well, which a cap would hide.
  float max[kLanes], poison[kLanes] = {};
  for (int l = 0; l < kLanes; l++) max[l] = -INFINITY;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; l++) {
      const float v = z[j + l];
      max[l] = v > max[l] ? v : max[l];
      poison[l] += v - v;
    }
  for (int l = 0; j < n; j++, l++) {
    max[l] = z[j] > max[l] ? z[j] : max[l];
    poison[l] += z[j] - z[j];
  }
  for (int l = 1; l < kLanes; l++) {
    max[0] = max[l] > max[0] ? max[l] : max[0];
    poison[0] += poison[l];
  }
  if (!(poison[0] == 0)) return NAN;
  if (cap <= 0) return max[0];
  const float inverse = 1 / cap;
  float largest = -INFINITY;  // of what was computed: fast_tanh is not monotonic to the last bit
  for (j = 0; j < n; j++) z[j] = cap * fast_tanh(z[j] * inverse);
  for (j = 0; j < n; j++) largest = z[j] > largest ? z[j] : largest;
  return largest;
}

struct Sums {
  double exponentials, plain; /* of e^(z - max), and of z - max: relative to the maximum there is less cancellation */
};
LCTX_CLONES Sums sum_row(const float* z, float max, int64_t n, bool want_plain) {
  Sums sums{0, 0};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    float e[kLanes] = {}, s[kLanes] = {};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes)
      for (int l = 0; l < kLanes; l++) e[l] += fast_exp(z[j + l] - max);
    for (int l = 0; j < end; j++, l++) e[l] += fast_exp(z[j] - max);
    if (want_plain) {
      for (j = begin; j + kLanes <= end; j += kLanes)
        for (int l = 0; l < kLanes; l++) s[l] += z[j + l] - max;
      for (int l = 0; j < end; j++, l++) s[l] += z[j] - max;
    }
    for (int l = 0; l < kLanes; l++) {
      sums.exponentials += e[l];
      sums.plain += s[l];
    }
  }
  return sums;
}

/* z -> factor e^(z - max) - uniform. From max, not lse: lse is rounded at its own size, which would be an error of every probability. */
LCTX_CLONES void gradient_row(float* z, float max, float factor, float uniform, int64_t n) {
  for (int64_t j = 0; j < n; j++) z[j] = factor * fast_exp(z[j] - max) - uniform;
}
/* As above, through the cap: d(capped)/d(z) = 1 - (capped / cap)^2. */
LCTX_CLONES void gradient_row_capped(float* z, float max, float factor, float uniform, float inverse_cap, int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    const float t = z[j] * inverse_cap;
    z[j] = (factor * fast_exp(z[j] - max) - uniform) * (1.0f - t * t);
  }
}

void cross_entropy_row(const RowsParams& p, int64_t r) {
  float* z = p.logits + r * p.ld;
  const float weight = p.weights ? p.weights[r] : 1.0f;
  if (weight == 0) {
    p.loss[r] = 0;
    if (p.gradient) std::memset(z, 0, static_cast<size_t>(p.vocab) * sizeof(float));
    return;
  }
  const float max = transform_row(z, p.bias, p.logit_scale, p.soft_cap, p.vocab);
  const float at_label = z[p.labels[r]];
  const double eps = p.label_smoothing, vocab = static_cast<double>(p.vocab);
  const Sums sums = sum_row(z, max, p.vocab, eps > 0);
  const double log_sum = std::log(sums.exponentials), lse = max + log_sum;
  // (1 - eps) (lse - z_y) + eps (lse - mean z), with lse = max + log_sum
  double loss = (1 - eps) * (log_sum + (static_cast<double>(max) - at_label));
  if (eps > 0) loss += eps * (log_sum - sums.plain / vocab);
  loss += p.z_loss * lse * lse;
  p.loss[r] = std::isnan(max) ? NAN : static_cast<float>(loss * weight);
  if (!p.gradient) return;
  // d/dz_j = softmax_j (1 + 2 z_loss lse) - eps / vocab - (1 - eps) [j = y], times `scale`
  const double scale = static_cast<double>(weight) * p.inverse_tokens * p.logit_scale;
  const double factor = (1 + 2 * p.z_loss * lse) * scale, uniform = eps / vocab * scale;
  double label_gradient = factor * std::exp(static_cast<double>(at_label) - max) / sums.exponentials - uniform - (1 - eps) * scale;
  if (p.soft_cap > 0) {
    const double t = static_cast<double>(at_label) / p.soft_cap;
    label_gradient *= 1 - t * t;
    gradient_row_capped(z, max, static_cast<float>(factor / sums.exponentials), static_cast<float>(uniform), 1 / p.soft_cap, p.vocab);
  } else {
    gradient_row(z, max, static_cast<float>(factor / sums.exponentials), static_cast<float>(uniform), p.vocab);
  }
  z[p.labels[r]] = static_cast<float>(label_gradient);
}

}  // namespace

void cross_entropy_rows(const RowsParams& p) {
  parallel(0, p.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, p.vocab)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) cross_entropy_row(p, r);
  });
}

void gather_rows(const GatherParams& p) {
  parallel(0, p.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.width)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      std::memcpy(p.dst + i * p.lddst, p.src + static_cast<int64_t>(p.index[i]) * p.ldsrc, static_cast<size_t>(p.width) * sizeof(float));
  });
}
void scatter_rows(const GatherParams& p) {
  parallel(0, p.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.width)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      std::memcpy(p.dst + static_cast<int64_t>(p.index[i]) * p.lddst, p.src + i * p.ldsrc, static_cast<size_t>(p.width) * sizeof(float));
  });
}

}  // namespace lctx::chunked_ce
