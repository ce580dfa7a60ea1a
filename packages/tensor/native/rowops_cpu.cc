/* Row ops on f32. Sums go in a fixed number of lanes, or of partial sums over fixed ranges of rows, which depend on the shape alone: the bits do not
 * depend on the number of threads. */
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu_kernels.h"
#include "half.h"
#include "scratch.h"

/* By instruction set, not by CPU model: a model's name would match one vendor only. */
#define LCTX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace lctx::cpu {
namespace {

constexpr int64_t kTaskElements = 16384;  // enough to be worth waking a thread
constexpr int64_t kSumRows = 128;         // rows per partial sum, at least
constexpr int64_t kSums = 32;             // partial sums, at most

int64_t grain(int64_t width) { return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width)); }

constexpr int kLanes = 32;
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
LCTX_CLONES void norm_backward_row(const float* x, const float* w, const float* dout, float* dx, float inverse, float c, int64_t n) {
  for (int64_t i = 0; i < n; i++) dx[i] = inverse * (dout[i] * w[i] - x[i] * c);
}
LCTX_CLONES void norm_backward_add_row(const float* x, const float* w, const float* dout, float* dx, float inverse, float c, int64_t n) {
  for (int64_t i = 0; i < n; i++) dx[i] += inverse * (dout[i] * w[i] - x[i] * c);
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

/* fn(a, b, out, n) over packed pieces: rows, or one long row where nothing lies between them. */
template <class Fn>
void elementwise(const RowsParams& p, const Fn& fn) {
  const bool flat = p.ldout == p.width && (!p.a || p.lda == p.width) && (!p.b || p.ldb == p.width);
  if (flat || p.rows == 1) {
    parallel(0, p.rows * p.width, kTaskElements, [&](int64_t begin, int64_t end) {
      fn(p.a ? p.a + begin : nullptr, p.b ? p.b + begin : nullptr, p.out + begin, end - begin);
    });
    return;
  }
  parallel(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) fn(p.a ? p.a + r * p.lda : nullptr, p.b ? p.b + r * p.ldb : nullptr, p.out + r * p.ldout, p.width);
  });
}

thread_local Scratch t_sums;

/* out[width] += the sum over rows; `add(first, last, sums)` adds rows first .. last to its own zeroed sums. */
template <class Add>
void sum_in_parts(int64_t rows, int64_t width, float* out, const Add& add) {
  const int64_t parts = std::clamp<int64_t>(rows / kSumRows, 1, kSums);
  const int64_t base = rows / parts, extra = rows % parts;
  float* sums = t_sums.get(parts * width);
  parallel(0, parts, std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, base * width)), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      std::memset(sums + part * width, 0, static_cast<size_t>(width) * sizeof(float));
      const int64_t first = part * base + std::min(part, extra);
      add(first, first + base + (part < extra ? 1 : 0), sums + part * width);
    }
  });
  for (int64_t part = 0; part < parts; part++) add_row(out, sums + part * width, out, width);
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
  const auto rows = [&](int64_t begin, int64_t end, float* dw) {
    for (int64_t r = begin; r < end; r++) {
      for (int64_t g = 0; g < p.groups; g++) {
        const float* x = p.x + r * p.ldx + g * p.width;
        const float* dout = p.dout + r * p.lddout + g * p.width;
        float* dx = p.dx + r * p.lddx + g * p.width;
        const float inverse = 1.0f / std::sqrt(dot(x, x, p.width) / static_cast<float>(p.width) + p.eps);
        const float c = inverse * inverse * dot3(dout, p.weight, x, p.width) / static_cast<float>(p.width);
        if (dw) weight_row(x, dout, dw, inverse, p.width);  // before dx, which may be dout or x
        if (p.accumulate) norm_backward_add_row(x, p.weight, dout, dx, inverse, c, p.width);
        else norm_backward_row(x, p.weight, dout, dx, inverse, c, p.width);
      }
    }
  };
  if (p.dweight) sum_in_parts(p.rows, p.width, p.dweight, rows);
  else parallel(0, p.rows, grain(p.width * p.groups), [&](int64_t begin, int64_t end) { rows(begin, end, nullptr); });
}

void add(const RowsParams& p) {
  elementwise(p, [](const float* a, const float* b, float* out, int64_t n) { add_row(a, b, out, n); });
}
void add_bias(const RowsParams& p) {
  parallel(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) add_row(p.out + r * p.ldout, p.b, p.out + r * p.ldout, p.width);
  });
}
void sum_rows(const RowsParams& p) {
  if (!p.accumulate) std::memset(p.out, 0, static_cast<size_t>(p.width) * sizeof(float));
  sum_in_parts(p.rows, p.width, p.out, [&](int64_t begin, int64_t end, float* sums) {
    for (int64_t r = begin; r < end; r++) add_row(sums, p.a + r * p.lda, sums, p.width);
  });
}
void scale(const RowsParams& p) {
  elementwise(p, [&](const float*, const float*, float* out, int64_t n) { scale_row(out, p.alpha, n); });
}
void axpy(const RowsParams& p) {
  elementwise(p, [&](const float* a, const float*, float* out, int64_t n) { axpy_row(a, p.alpha, out, n); });
}

void embedding_gather(const EmbeddingParams& p) {
  parallel(0, p.n, grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      float* out = p.out + i * p.ldout;
      const int64_t at = static_cast<int64_t>(p.ids[i]) * p.ldtable;
      switch (p.dtype) {
        case LCTX_BF16: bf16_to_f32_row(out, static_cast<const uint16_t*>(p.table) + at, p.width); break;
        case LCTX_F16: f16_to_f32_row(out, static_cast<const uint16_t*>(p.table) + at, p.width); break;
        default: std::memcpy(out, static_cast<const float*>(p.table) + at, static_cast<size_t>(p.width) * sizeof(float));
      }
    }
  });
}

void embedding_scatter_add(const EmbeddingParams& p) {
  // A table row belongs to one task (by id), which takes the tokens in order: no two threads touch one element, and the order is fixed.
  const int64_t tasks = std::clamp<int64_t>(p.n * p.width / kTaskElements, 1, num_threads() * 4);
  parallel(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < p.n; i++) {
      const int64_t id = p.ids[i], task = id % tasks;
      if (task < begin || task >= end) continue;
      float* row = p.dtable + id * p.ldtable;
      add_row(row, p.dout + i * p.ldout, row, p.width);
    }
  });
}

}  // namespace lctx::cpu
