/* AdamW (Loshchilov & Hutter, 2019) as torch.optim.AdamW orders it; 8-bit states after Dettmers et al., "8-bit Optimizers via Block-wise
 * Quantization", 2022. */
#include "optim.h"

#include <algorithm>
#include <cmath>

#include "lctx/napi_glue.h"
#include "search.h"

#define LC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace lc_qlora {
namespace {

struct Task {
  int64_t segment, first, count;
};
std::vector<Task> tasks_of(const std::vector<AdamSegment>& segments) {
  std::vector<Task> tasks;
  for (size_t s = 0; s < segments.size(); s++)
    for (int64_t first = 0; first < segments[s].n; first += kChunk)
      tasks.push_back({static_cast<int64_t>(s), first, std::min(kChunk, segments[s].n - first)});
  return tasks;
}

/* Elements are independent, so the vectorised loop gives each the same bits wherever it lies. */
LC_CLONES void update(const AdamStep& p, float* __restrict value, const float* __restrict grad, float* __restrict m, float* __restrict v, int64_t n) {
  const float beta2 = p.beta2, rest1 = p.rest1, rest2 = p.rest2, eps = p.eps, decay = p.decay;
  const float step_size = p.step_size, root_bias2 = p.root_bias2, grad_scale = p.grad_scale;
  for (int64_t i = 0; i < n; i++) {
    const float g = grad[i] * grad_scale;
    m[i] += (g - m[i]) * rest1;
    v[i] = v[i] * beta2 + rest2 * g * g;
    value[i] = value[i] * decay - step_size * (m[i] / (std::sqrt(v[i]) / root_bias2 + eps));
  }
}

LC_CLONES void encode(const Map256& map, const float* x, int64_t n, float scale, uint8_t* codes) {
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < n; i++) codes[i] = map.nearest(x[i] * inverse);
}

void update8(const AdamStep& p, const AdamSegment& s, int64_t first, int64_t n) {
  const Map256 &m_map = signed_map(), &v_map = unsigned_map();
  float m[kStateBlock], v[kStateBlock];
  const int64_t block = first / kStateBlock;
  uint8_t* m8 = s.m8 + first;
  uint8_t* v8 = s.v8 + first;
  for (int64_t i = 0; i < n; i++) {
    m[i] = m_map.values[m8[i]] * s.m_scale[block];
    v[i] = v_map.values[v8[i]] * s.v_scale[block];
  }
  update(p, s.value + first, s.grad + first, m, v, n);  // with the states before they are rounded
  float m_largest = 0, v_largest = 0;
  for (int64_t i = 0; i < n; i++) {
    m_largest = std::max(m_largest, std::fabs(m[i]));
    v_largest = std::max(v_largest, v[i]);
  }
  // A subnormal scale has no finite inverse; such states count as zero.
  if (m_largest < 0x1p-126f) m_largest = 0;
  if (v_largest < 0x1p-126f) v_largest = 0;
  s.m_scale[block] = m_largest;
  s.v_scale[block] = v_largest;
  encode(m_map, m, n, m_largest, m8);
  encode(v_map, v, n, v_largest, v8);
  // v that rounds to zero beside a live m would make the next step m / eps: keep at least the smallest level.
  for (int64_t i = 0; i < n; i++)
    if (v8[i] == 0 && v[i] > 0) v8[i] = 1;
}

}  // namespace

void adamw(const AdamStep& p) {
  const std::vector<Task> tasks = tasks_of(p.segments);
  lctx::parallel(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const auto [segment, first, count] = tasks[static_cast<size_t>(t)];
      const AdamSegment& s = p.segments[static_cast<size_t>(segment)];
      if (s.m) {
        update(p, s.value + first, s.grad + first, s.m + first, s.v + first, count);
        continue;
      }
      for (int64_t i = 0; i < count; i += kStateBlock) update8(p, s, first + i, std::min(kStateBlock, count - i));
    }
  });
}

double grad_norm(const std::vector<AdamSegment>& segments) {
  const std::vector<Task> tasks = tasks_of(segments);
  std::vector<double> partial(tasks.size());
  lctx::parallel(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const auto [segment, first, count] = tasks[static_cast<size_t>(t)];
      const float* g = segments[static_cast<size_t>(segment)].grad + first;
      double sums[8] = {};  // eight chains, so that it vectorises in a fixed order
      for (int64_t i = 0; i < count; i++) sums[i & 7] += static_cast<double>(g[i]) * g[i];
      partial[static_cast<size_t>(t)] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
  });
  double total = 0;
  for (const double sum : partial) total += sum;
  return std::sqrt(total);
}

}  // namespace lc_qlora
