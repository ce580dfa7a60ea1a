#include "lora.h"

#include <algorithm>

#include "lctx/napi_glue.h"
#include "philox.h"

#define LC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace lc_qlora {
namespace {

constexpr int kLanes = 16;

/* 64 features at a time: 16 counters of 4 words; word w of lane i belongs to feature 4 i + w. */
LC_CLONES void dropout_row(const Dropout& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* out = p.out + row * p.out_stride;
  const uint64_t token = p.start + static_cast<uint64_t>(row);
  float mask[4 * kLanes];
  uint32_t words[4][kLanes];
  for (int64_t f = 0; f < p.width; f += 4 * kLanes) {
    philox<kLanes>(static_cast<uint32_t>(f / 4), static_cast<uint32_t>(token), static_cast<uint32_t>(token >> 32), p.site, static_cast<uint32_t>(p.seed),
                   static_cast<uint32_t>(p.seed >> 32), words);
    for (int w = 0; w < 4; w++)
      for (int i = 0; i < kLanes; i++) mask[4 * i + w] = words[w][i] >= p.threshold ? p.scale : 0.0f;
    const int64_t n = std::min<int64_t>(4 * kLanes, p.width - f);
    if (p.accumulate) {
      for (int64_t i = 0; i < n; i++) out[f + i] += mask[i] != 0.0f ? x[f + i] * mask[i] : 0.0f;
    } else {
      for (int64_t i = 0; i < n; i++) out[f + i] = mask[i] != 0.0f ? x[f + i] * mask[i] : 0.0f;
    }
  }
}

}  // namespace

void dropout(const Dropout& p) {
  lctx::parallel(0, p.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, p.width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) dropout_row(p, row);
  });
}

void uniform(const Uniform& p) {
  lctx::parallel(0, (p.n + 3) / 4, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; q++) {
      uint32_t words[4][1];
      philox<1>(static_cast<uint32_t>(q), p.site, static_cast<uint32_t>(q >> 32), 1, static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32), words);
      for (int64_t i = 4 * q; i < std::min(p.n, 4 * q + 4); i++)
        p.out[i] = p.low + (p.high - p.low) * (static_cast<float>(words[i & 3][0] >> 8) * 0x1p-24f);
    }
  });
}

void gather_expert_b(const ExpertB& p) {
  lctx::parallel(0, p.out, 64, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++)
      for (int64_t e = 0; e < p.experts; e++)
        for (int64_t k = 0; k < p.rank; k++) p.grouped[(e * p.out + o) * p.rank + k] = p.b[(o * p.rank + k) * p.experts + e];
  });
}

void scatter_expert_b(const ExpertB& p) {
  lctx::parallel(0, p.out, 64, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++)
      for (int64_t e = 0; e < p.experts; e++)
        for (int64_t k = 0; k < p.rank; k++) p.b[(o * p.rank + k) * p.experts + e] += p.grouped[(e * p.out + o) * p.rank + k];
  });
}

}  // namespace lc_qlora
