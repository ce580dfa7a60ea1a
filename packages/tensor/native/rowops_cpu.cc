#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu_kernels.h"
#include "half.h"

#define LCTX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace lctx::cpu {
namespace {

/* Rows per range: enough work to be worth waking a thread. */
int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

/* Sums in 16 lanes and a fixed order: vectorised and the same bits everywhere that has the same vector width or not. */
constexpr int kLanes = 16;
LCTX_CLONES float dot(const float* a, const float* b, int64_t n) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; l++) lane[l] += a[i + l] * b[i + l];
  float sum = 0;
  for (; i < n; i++) sum += a[i] * b[i];
  for (int l = 0; l < kLanes; l++) sum += lane[l];
  return sum;
}
LCTX_CLONES float dot3(const float* a, const float* b, const float* c, int64_t n) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; l++) lane[l] += a[i + l] * b[i + l] * c[i + l];
  float sum = 0;
  for (; i < n; i++) sum += a[i] * b[i] * c[i];
  for (int l = 0; l < kLanes; l++) sum += lane[l];
  return sum;
}
LCTX_CLONES void norm_row(const float* x, const float* w, float* out, float inverse, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * inverse * w[i];
}
/* dx = inverse * (dout * w - x * c), with c = inverse^2 * mean(dout * w * x) */
LCTX_CLONES void norm_backward_row(const float* x, const float* w, const float* dout, float* dx, float inverse, float c, bool accumulate, int64_t n) {
  if (accumulate) {
    for (int64_t i = 0; i < n; i++) dx[i] += inverse * (dout[i] * w[i] - x[i] * c);
  } else {
    for (int64_t i = 0; i < n; i++) dx[i] = inverse * (dout[i] * w[i] - x[i] * c);
  }
}
LCTX_CLONES void weight_row(const float* x, const float* dout, float* dw, float inverse, int64_t n) {
  for (int64_t i = 0; i < n; i++) dw[i] += dout[i] * x[i] * inverse;
}
LCTX_CLONES void add_row(const float* a, const float* b, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}
LCTX_CLONES void axpy_row(const float* a, float alpha, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] += alpha * a[i];
}
LCTX_CLONES void scale_row(float* out, float alpha, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] *= alpha;
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  parallel(0, p.rows, grain(p.width * p.groups), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      for (int64_t g = 0; g < p.groups; g++) {
        const float* x = p.x + r * p.ldx + g * p.width;
        const float inverse = 1.0f / std::sqrt(dot(x, x, p.width) / static_cast<float>(p.width) + p.eps);
        norm_row(x, p.weight, p.out + r * p.ldout + g * p.width, inverse, p.width);
      }
    }
  });
}

void rms_norm_backward(const RmsNormParams& p) {
  // dweight: a fixed number of partial sums over fixed row ranges, added in order, so its bits do not depend on the threads.
  const int64_t parts = p.dweight ? p.partials : 1;
  const int64_t per = (p.rows + parts - 1) / parts;
  if (p.dweight) std::memset(p.partial, 0, static_cast<size_t>(parts * p.width) * sizeof(float));
  auto rows = [&](int64_t begin, int64_t end, float* dw) {
    for (int64_t r = begin; r < end; r++) {
      for (int64_t g = 0; g < p.groups; g++) {
        const float* x = p.x + r * p.ldx + g * p.width;
        const float* dout = p.dout + r * p.lddout + g * p.width;
        const float inverse = 1.0f / std::sqrt(dot(x, x, p.width) / static_cast<float>(p.width) + p.eps);
        const float c = inverse * inverse * dot3(dout, p.weight, x, p.width) / static_cast<float>(p.width);
        if (dw) weight_row(x, dout, dw, inverse, p.width);
        norm_backward_row(x, p.weight, dout, p.dx + r * p.lddx + g * p.width, inverse, c, p.accumulate, p.width);
      }
    }
  };
  if (!p.dweight) {
    parallel(0, p.rows, grain(p.width * p.groups), [&](int64_t begin, int64_t end) { rows(begin, end, nullptr); });
    return;
  }
  parallel(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; part++) rows(part * per, std::min(p.rows, (part + 1) * per), p.partial + part * p.width);
  });
  for (int64_t part = 0; part < parts; part++) add_row(p.dweight, p.partial + part * p.width, p.dweight, p.width);
}

void add(const RowsParams& p) {
  parallel(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) add_row(p.a + r * p.lda, p.b + r * p.ldb, p.out + r * p.ldout, p.width);
  });
}
void add_bias(const RowsParams& p) {
  parallel(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) add_row(p.out + r * p.ldout, p.b, p.out + r * p.ldout, p.width);
  });
}
void sum_rows(const RowsParams& p) {
  // By column ranges: every output element is summed by one thread, in row order.
  parallel(0, p.width, std::max<int64_t>(16, 16384 / std::max<int64_t>(1, p.rows)), [&](int64_t begin, int64_t end) {
    if (!p.accumulate) std::memset(p.out + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    for (int64_t r = 0; r < p.rows; r++) add_row(p.out + begin, p.a + r * p.lda + begin, p.out + begin, end - begin);
  });
}
void scale(const RowsParams& p) {
  parallel(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) scale_row(p.out + r * p.ldout, p.alpha, p.width);
  });
}
void axpy(const RowsParams& p) {
  parallel(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) axpy_row(p.a + r * p.lda, p.alpha, p.out + r * p.ldout, p.width);
  });
}

void embedding_gather(const EmbeddingParams& p) {
  parallel(0, p.n, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      float* out = p.out + i * p.ldout;
      const int64_t at = static_cast<int64_t>(p.ids[i]) * p.ldtable;
      if (p.dtype == LCTX_F32) {
        std::memcpy(out, static_cast<const float*>(p.table) + at, static_cast<size_t>(p.width) * sizeof(float));
      } else {
        const uint16_t* row = static_cast<const uint16_t*>(p.table) + at;
        if (p.dtype == LCTX_BF16) for (int64_t j = 0; j < p.width; j++) out[j] = bf16_to_f32(row[j]);
        else for (int64_t j = 0; j < p.width; j++) out[j] = f16_to_f32(row[j]);
      }
    }
  });
}

void embedding_scatter_add(const EmbeddingParams& p) {
  // By column ranges, tokens in order: no two threads touch one element, and the order is fixed.
  parallel(0, p.width, std::max<int64_t>(16, 16384 / std::max<int64_t>(1, p.n)), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < p.n; i++) {
      float* row = p.dtable + static_cast<int64_t>(p.ids[i]) * p.ldtable;
      add_row(row + begin, p.dout + i * p.ldout + begin, row + begin, end - begin);
    }
  });
}

}  // namespace lctx::cpu
