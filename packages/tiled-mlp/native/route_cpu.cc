#include <algorithm>
#include <cstring>

#include "lctx/napi_glue.h"
#include "tiled_mlp.h"
#include "vector_math.h"

namespace lctx::mlp {
namespace {

/* Softmax in place, in index order: one token's few experts. */
void softmax(float* x, int64_t n) {
  float largest = x[0];
  for (int64_t i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
  float sum = 0;
  for (int64_t i = 0; i < n; i++) {
    x[i] = x[i] - largest < -87.0f ? 0.0f : exp32(x[i] - largest);
    sum += x[i];
  }
  const float inverse = 1.0f / sum;
  for (int64_t i = 0; i < n; i++) x[i] *= inverse;
}

/* The k largest, best first, ties to the lower index. Ids are distinct and in range whatever the values are, NaN too. */
void top_k(const float* x, int64_t n, int64_t k, int32_t* ids) {
  for (int64_t j = 0; j < k; j++) {
    int64_t best = -1;
    for (int64_t e = 0; e < n; e++) {
      if (best >= 0 && !(x[e] > x[best])) continue;
      bool taken = false;
      for (int64_t i = 0; i < j; i++) taken |= ids[i] == e;
      if (!taken) best = e;
    }
    ids[j] = static_cast<int32_t>(best);
  }
}

/* In 16 lanes and a fixed order. */
LCTX_CLONES float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
  float lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; l++) lane[l] += a[i + l] * b[i + l];
  float sum = 0;
  for (; i < n; i++) sum += a[i] * b[i];
  for (int l = 0; l < 16; l++) sum += lane[l];
  return sum;
}
LCTX_CLONES void scaled_row(float* __restrict out, const float* __restrict x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = factor * x[i];
}
LCTX_CLONES void add_scaled(float* __restrict out, const float* __restrict x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] += factor * x[i];
}
LCTX_CLONES void add_scaled_sum(float* __restrict out, const float* __restrict x, const float* __restrict bias, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] += factor * (x[i] + bias[i]);
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

}  // namespace

void route(const RouteParams& p) {
  parallel(0, p.tokens, grain(p.experts * (p.top_k + 4)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* logits = p.logits + t * p.ldlogits;
      int32_t* ids = p.ids + t * p.top_k;
      float* weights = p.weights + t * p.top_k;
      if (p.softmax_first) softmax(logits, p.experts);
      top_k(logits, p.experts, p.top_k, ids);
      for (int64_t j = 0; j < p.top_k; j++) weights[j] = logits[ids[j]];
      if (!p.softmax_first) {
        softmax(weights, p.top_k);
      } else if (p.normalize) {
        float sum = 0;
        for (int64_t j = 0; j < p.top_k; j++) sum += weights[j];
        for (int64_t j = 0; j < p.top_k; j++) weights[j] /= sum;
      }
    }
  });
  // A stable counting sort; offsets doubles as the cursor. Serial: a few thousand pairs.
  const int64_t pairs = p.tokens * p.top_k;
  std::memset(p.offsets, 0, static_cast<size_t>(p.experts + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < pairs; i++) p.offsets[p.ids[i] + 1]++;
  for (int64_t e = 0; e < p.experts; e++) p.offsets[e + 1] += p.offsets[e];
  for (int64_t i = 0; i < pairs; i++) {
    const int32_t row = p.offsets[p.ids[i]]++;
    p.row_of[i] = row;
    p.pair_of[row] = static_cast<int32_t>(i);
  }
  for (int64_t e = p.experts; e > 0; e--) p.offsets[e] = p.offsets[e - 1];
  p.offsets[0] = 0;
}

void route_backward(const RouteBackwardParams& p) {
  parallel(0, p.tokens, grain(p.top_k * (p.width + p.hidden)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* dlogits = p.dlogits + t * p.lddlogits;
      std::memset(dlogits, 0, static_cast<size_t>(p.experts) * sizeof(float));
      float sum = 0;
      for (int64_t j = 0; j < p.top_k; j++) {
        const int64_t pair = t * p.top_k + j, row = p.row_of[pair], expert = p.ids[pair];
        float s = p.dots ? p.dots[row] : dot(p.act + row * p.ldact, p.dact + row * p.lddact, p.width);
        if (p.bias) s += dot(p.dy + row * p.lddy, p.bias + expert * p.hidden, p.hidden);
        dlogits[expert] = s;
        sum += s;
      }
      if (p.probabilities) {
        const float* probabilities = p.probabilities + t * p.ldprobabilities;
        for (int64_t e = 0; e < p.experts; e++) dlogits[e] -= probabilities[e] * sum;
      } else {
        for (int64_t j = 0; j < p.top_k; j++) dlogits[p.ids[t * p.top_k + j]] -= p.weights[t * p.top_k + j] * sum;
      }
    }
  });
}

void gather(const GatherParams& p) {
  parallel(0, p.tokens, grain(p.width * p.top_k), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* x = p.x + t * p.ldx;
      for (int64_t pair = t * p.top_k; pair < (t + 1) * p.top_k; pair++) {
        float* out = p.out + p.row_of[pair] * p.ldout;
        if (p.weights) scaled_row(out, x, p.weights[pair], p.width);
        else std::memcpy(out, x, static_cast<size_t>(p.width) * sizeof(float));
      }
    }
  });
}

void combine(const CombineParams& p) {
  parallel(0, p.tokens, grain(p.width * p.top_k), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* out = p.out + t * p.ldout;
      const float* base = p.base ? p.base + t * p.ldbase : nullptr;
      if (!base) std::memset(out, 0, static_cast<size_t>(p.width) * sizeof(float));
      else if (base != out) std::memcpy(out, base, static_cast<size_t>(p.width) * sizeof(float));
      for (int64_t j = 0; j < p.top_k; j++) {
        const int64_t pair = t * p.top_k + j;
        const float* y = p.y + p.row_of[pair] * p.ldy;
        const float weight = p.weights ? p.weights[pair] : 1.0f;
        if (p.bias) add_scaled_sum(out, y, p.bias + p.ids[pair] * p.width, weight, p.width);
        else add_scaled(out, y, weight, p.width);
      }
    }
  });
}

}  // namespace lctx::mlp
