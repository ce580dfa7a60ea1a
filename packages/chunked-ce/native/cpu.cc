#include <algorithm>
#include <cmath>
#include <cstring>

#include "chunked_ce.h"
#include "lctx/napi_glue.h"

#define LCTX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace lctx::chunked_ce {
namespace {

constexpr int kLanes = 16;  // sums run in 16 lanes, in a fixed order

/* e^x for x <= 0 or so: 2^n times a polynomial on [-ln2/2, ln2/2]; relative error about 1e-7. Below -87 it is 0, NaN stays NaN. */
inline float fast_exp(float x) {
  const float t = x * 1.44269504088896341f;
  const float n = std::nearbyintf(t < -126.0f ? -126.0f : (t > 127.0f ? 127.0f : t));
  const float r = std::fma(n, -1.42860677e-6f, std::fma(n, -0.693145752f, x));  // x - n ln2 in two parts
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
  return x < -87.0f ? 0.0f : (x == x ? y : x);
}

/* z of every column in place; returns the maximum (NaN when any is NaN). */
LCTX_CLONES float transform_row(float* z, const float* bias, float scale, int64_t n) {
  if (bias) {
    for (int64_t j = 0; j < n; j++) z[j] = (z[j] + bias[j]) * scale;
  } else if (scale != 1.0f) {
    for (int64_t j = 0; j < n; j++) z[j] *= scale;
  }
  float lane[kLanes];
  float nan = 0;
  for (int l = 0; l < kLanes; l++) lane[l] = -INFINITY;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; l++) lane[l] = z[j + l] > lane[l] ? z[j + l] : lane[l];
  float max = -INFINITY;
  for (; j < n; j++) max = z[j] > max ? z[j] : max;
  for (int l = 0; l < kLanes; l++) max = lane[l] > max ? lane[l] : max;
  // A comparison never picks a NaN up; a sum of x - x does (infinities as well: their loss is not finite either).
  float poison[kLanes] = {};
  for (j = 0; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; l++) poison[l] += z[j + l] - z[j + l];
  for (; j < n; j++) nan += z[j] - z[j];
  for (int l = 0; l < kLanes; l++) nan += poison[l];
  return nan == 0 ? max : NAN;
}

struct Sums {
  float exponentials, plain;
};
LCTX_CLONES Sums sum_row(const float* z, float max, int64_t n, bool want_plain) {
  float e[kLanes] = {}, s[kLanes] = {};
  Sums sums{0, 0};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; l++) e[l] += fast_exp(z[j + l] - max);
  for (; j < n; j++) sums.exponentials += fast_exp(z[j] - max);
  if (want_plain) {
    for (j = 0; j + kLanes <= n; j += kLanes)
      for (int l = 0; l < kLanes; l++) s[l] += z[j + l] - max;  // relative to the maximum: less cancellation
    for (; j < n; j++) sums.plain += z[j] - max;
  }
  for (int l = 0; l < kLanes; l++) {
    sums.exponentials += e[l];
    sums.plain += s[l];
  }
  return sums;
}

/* z -> factor * softmax(z) - uniform. */
LCTX_CLONES void gradient_row(float* z, float lse, float factor, float uniform, int64_t n) {
  for (int64_t j = 0; j < n; j++) z[j] = factor * fast_exp(z[j] - lse) - uniform;
}
/* As above, through the cap: d(capped)/d(z) = 1 - (capped / cap)^2. */
LCTX_CLONES void gradient_row_capped(float* z, float lse, float factor, float uniform, float inverse_cap, int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    const float t = z[j] * inverse_cap;
    z[j] = (factor * fast_exp(z[j] - lse) - uniform) * (1.0f - t * t);
  }
}
LCTX_CLONES void scale_row(float* z, float s, int64_t n) {
  for (int64_t j = 0; j < n; j++) z[j] *= s;
}

}  // namespace

void cross_entropy_rows(const RowsParams& p) {
  parallel(0, p.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, p.vocab)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      float* z = p.logits + r * p.ld;
      const int32_t label = p.labels[r];
      const float weight = p.weights ? p.weights[r] : 1.0f;
      float max = transform_row(z, p.bias, p.logit_scale, p.vocab);
      if (p.soft_cap > 0) {
        for (int64_t j = 0; j < p.vocab; j++) z[j] = p.soft_cap * std::tanh(z[j] / p.soft_cap);
        max = std::isnan(max) ? max : p.soft_cap * std::tanh(max / p.soft_cap);
      }
      const float eps = p.label_smoothing;
      const Sums sums = sum_row(z, max, p.vocab, eps > 0);
      const float log_sum = std::log(sums.exponentials);  // lse - max
      const float lse = max + log_sum;
      // (1 - eps) (lse - z_y) + eps (lse - mean z)
      float loss = (1 - eps) * (log_sum + (max - z[label]));
      if (eps > 0) loss += eps * (log_sum - sums.plain / static_cast<float>(p.vocab));
      loss += p.z_loss * lse * lse;
      p.loss[r] = weight == 0 ? 0.0f : loss * weight;
      if (!p.gradient) continue;
      if (weight == 0) {
        std::memset(z, 0, static_cast<size_t>(p.vocab) * sizeof(float));
        continue;
      }
      // d/dz_j = softmax_j (1 + 2 z_loss lse) - eps / vocab - (1 - eps) [j = y]
      const float factor = 1 + 2 * p.z_loss * lse, uniform = eps / static_cast<float>(p.vocab);
      const float at_label = z[label] / (p.soft_cap > 0 ? p.soft_cap : 1);
      if (p.soft_cap > 0) {
        gradient_row_capped(z, lse, factor, uniform, 1 / p.soft_cap, p.vocab);
        z[label] -= (1 - eps) * (1 - at_label * at_label);
      } else {
        gradient_row(z, lse, factor, uniform, p.vocab);
        z[label] -= 1 - eps;
      }
      const float s = weight * p.inverse_tokens * p.logit_scale;
      if (s != 1.0f) scale_row(z, s, p.vocab);
    }
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
