#include <algorithm>

#include "lctx/napi_glue.h"
#include "tiled_mlp.h"
#include "vector_math.h"

namespace lctx::mlp {
namespace {

/* Each activation: value a(g) and derivative a'(g). */
struct Silu {
  LCTX_INLINE void at(float g, float& value, float& slope) {
    const float s = sigmoid32(g);
    value = g * s;
    slope = s * (1.0f + g * (1.0f - s));
  }
};
struct GeluErf {
  LCTX_INLINE void at(float g, float& value, float& slope) {
    const float density = exp32(-0.5f * g * g);
    const float cdf = normal_cdf32(g, density);
    value = g * cdf;
    slope = cdf + g * density * 0.3989422804f;
  }
};
struct GeluTanh { /* 0.5 g (1 + tanh z) = g sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3) */
  LCTX_INLINE void at(float g, float& value, float& slope) {
    const float square = g * g;
    const float s = sigmoid32(1.5957691216f * g * (1.0f + 0.044715f * square));
    value = g * s;
    slope = s + g * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * square);
  }
};

/* target_clones does not go on templates, so each activation gets its two row loops by macro. */
#define LCTX_GLU_ROWS(name, A)                                                                                                      \
  LCTX_CLONES void name##_row(const float* __restrict gate, const float* __restrict up, float* __restrict out, int64_t n) {         \
    for (int64_t i = 0; i < n; i++) {                                                                                               \
      float value, slope;                                                                                                           \
      A::at(gate[i], value, slope);                                                                                                 \
      out[i] = value * up[i];                                                                                                       \
    }                                                                                                                               \
  }                                                                                                                                 \
  LCTX_CLONES void name##_backward_row(float* __restrict gate, float* __restrict up, const float* __restrict dout, int64_t n) {     \
    for (int64_t i = 0; i < n; i++) {                                                                                               \
      float value, slope;                                                                                                           \
      A::at(gate[i], value, slope);                                                                                                 \
      gate[i] = dout[i] * up[i] * slope;                                                                                            \
      up[i] = dout[i] * value;                                                                                                      \
    }                                                                                                                               \
  }
LCTX_GLU_ROWS(silu, Silu)
LCTX_GLU_ROWS(gelu_erf, GeluErf)
LCTX_GLU_ROWS(gelu_tanh, GeluTanh)

LCTX_CLONES void gpt_oss_row(const float* __restrict both, float* __restrict out, int64_t n, float limit, float alpha) {
  for (int64_t i = 0; i < n; i++) {
    const float g = both[2 * i], u = both[2 * i + 1];
    const float gate = g > limit ? limit : g;
    const float up = u > limit ? limit : (u < -limit ? -limit : u);
    out[i] = (up + 1.0f) * (gate * sigmoid32(alpha * gate));
  }
}
LCTX_CLONES void gpt_oss_backward_row(float* __restrict both, const float* __restrict dout, int64_t n, float limit, float alpha) {
  for (int64_t i = 0; i < n; i++) {
    const float g = both[2 * i], u = both[2 * i + 1];
    const float gate = g > limit ? limit : g;
    const float up = u > limit ? limit : (u < -limit ? -limit : u);
    const float s = sigmoid32(alpha * gate);
    const float dgate = dout[i] * (up + 1.0f) * (s * (1.0f + alpha * gate * (1.0f - s)));
    const float dup = dout[i] * gate * s;
    both[2 * i] = g > limit ? 0.0f : dgate; /* beyond a clamp nothing changes; at it the gradient passes, as in torch */
    both[2 * i + 1] = (u > limit || u < -limit) ? 0.0f : dup;
  }
}
LCTX_CLONES void add_row(float* __restrict out, const float* __restrict a, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] += a[i];
}

/* In 16 lanes and a fixed order. */
LCTX_CLONES float dot_row(const float* __restrict a, const float* __restrict b, int64_t n) {
  float lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; l++) lane[l] += a[i + l] * b[i + l];
  float sum = 0;
  for (; i < n; i++) sum += a[i] * b[i];
  for (int l = 0; l < 16; l++) sum += lane[l];
  return sum;
}

struct Row {
  float *gate, *up;
  Row(const GluParams& p, int64_t r) : gate(p.gate + r * p.ldgate), up(p.up ? p.up + r * p.ldup : nullptr) {
    if (!p.bias) return;
    const float* bias = p.bias + static_cast<int64_t>(p.ids[p.pair_of[r]]) * p.bias_width;
    if (p.activation == kGptOss) {
      add_row(gate, bias, 2 * p.width);
    } else {
      add_row(gate, bias, p.width);
      add_row(up, bias + p.width, p.width);
    }
  }
  /* Of `n` columns from `first` on. */
  void forward(const GluParams& p, int64_t first, int64_t n, float* out) const {
    switch (p.activation) {
      case kSilu: silu_row(gate + first, up + first, out, n); break;
      case kGeluErf: gelu_erf_row(gate + first, up + first, out, n); break;
      case kGeluTanh: gelu_tanh_row(gate + first, up + first, out, n); break;
      default: gpt_oss_row(gate + 2 * first, out, n, p.limit, p.alpha);
    }
  }
};

int64_t grain(int64_t width) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width)); }

}  // namespace

void glu(const GluParams& p) {
  parallel(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) Row(p, r).forward(p, 0, p.width, p.out + r * p.ldout);
  });
}

void glu_backward(const GluParams& p) {
  parallel(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const Row row(p, r);
      const float* dout = p.dout + r * p.lddout;
      if (p.dots) {
        constexpr int64_t kPiece = 512;
        float act[kPiece], sum = 0;
        for (int64_t first = 0; first < p.width; first += kPiece) {
          const int64_t n = std::min(kPiece, p.width - first);
          row.forward(p, first, n, act);
          sum += dot_row(act, dout + first, n);
        }
        p.dots[r] = sum;
      }
      switch (p.activation) {
        case kSilu: silu_backward_row(row.gate, row.up, dout, p.width); break;
        case kGeluErf: gelu_erf_backward_row(row.gate, row.up, dout, p.width); break;
        case kGeluTanh: gelu_tanh_backward_row(row.gate, row.up, dout, p.width); break;
        default: gpt_oss_backward_row(row.gate, dout, p.width, p.limit, p.alpha);
      }
    }
  });
}

}  // namespace lctx::mlp
