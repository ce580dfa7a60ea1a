/* NF4 with double quantization (Dettmers et al., QLoRA, 2023, section 3). */
#include <algorithm>
#include <cmath>

#include "convert.h"
#include "lctx/napi_glue.h"
#include "quant.h"
#include "search.h"

#define LC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace lc_qlora {

const float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                        -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

namespace {

/* Codes of one block that is already divided by its absmax: the number of midpoints below the value, so a tie takes the lower level. */
LC_CLONES void encode(const float* x, int64_t n, float inverse, int32_t* codes) {
  float middle[15];
  for (int k = 0; k < 15; k++) middle[k] = (kNf4[k] + kNf4[k + 1]) * 0.5f;
  for (int64_t i = 0; i < n; i++) {
    const float v = x[i] * inverse;
    int32_t code = 0;
    for (int k = 0; k < 15; k++) code += v > middle[k];
    codes[i] = code;
  }
}

/* Largest magnitude; not finite when a value is not (max drops NaN, so the bits are compared). */
LC_CLONES float magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) largest = std::max(largest, to_bits(x[i]) & 0x7fffffffu);
  return from_bits(largest);
}

}  // namespace

bool nf4_quantize(const Nf4Quantize& p) {
  const int64_t blocks = (p.n + p.block - 1) / p.block;
  bool finite = true;
  lctx::parallel(0, blocks, std::max<int64_t>(1, 16384 / p.block), [&](int64_t begin, int64_t end) {
    float x[kMaxBlock];
    int32_t codes[kMaxBlock + 1];
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * p.block, n = std::min(p.block, p.n - first);
      load_block(p.x, p.dtype, first, n, x);
      const float absmax = magnitude(x, n);
      if (!std::isfinite(absmax)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      p.absmax[b] = absmax;
      if (absmax > 0.0f) {
        // 1 / absmax overflows for subnormal absmax: then divide by scaling both up (exact, powers of two).
        float inverse = 1.0f / absmax;
        if (!std::isfinite(inverse)) {
          for (int64_t i = 0; i < n; i++) x[i] *= 0x1p64f;
          inverse = 1.0f / (absmax * 0x1p64f);
        }
        encode(x, n, inverse, codes);
      } else {
        std::fill(codes, codes + n, kNf4Zero);
      }
      codes[n] = kNf4Zero;  // the unused half of an odd tensor's last byte
      uint8_t* out = p.codes + first / 2;
      for (int64_t i = 0; i < (n + 1) / 2; i++) out[i] = static_cast<uint8_t>((codes[2 * i] << 4) | codes[2 * i + 1]);
    }
  });
  return finite;
}

void double_quantize(const DoubleQuantize& p) {
  double sum = 0;  // f64 and in order: the same on any number of threads
  for (int64_t i = 0; i < p.n; i++) sum += p.absmax[i];
  const float offset = p.n ? static_cast<float>(sum / static_cast<double>(p.n)) : 0.0f;
  *p.offset = offset;
  const Map256& map = signed_map();
  lctx::parallel(0, (p.n + kScaleBlock - 1) / kScaleBlock, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * kScaleBlock, last = std::min(p.n, first + kScaleBlock);
      float scale = 0;
      for (int64_t i = first; i < last; i++) scale = std::max(scale, std::fabs(p.absmax[i] - offset));
      p.scales[b] = scale;
      const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
      for (int64_t i = first; i < last; i++) p.codes[i] = map.nearest((p.absmax[i] - offset) * inverse);
    }
  });
}

void nf4_dequantize(const Nf4Dequantize& p) {
  const int64_t blocks = (p.n + p.block - 1) / p.block;
  const Map256& map = signed_map();
  lctx::parallel(0, blocks, std::max<int64_t>(1, 32768 / p.block), [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kMaxBlock];
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * p.block, n = std::min(p.block, p.n - first);
      const float scale = p.absmax ? p.absmax[b] : map.values[p.codes2[b]] * p.scales[b / kScaleBlock] + *p.offset;
      if (p.out_dtype == LCTX_F32) {
        decode4(p.codes + first / 2, n, kNf4, scale, true, static_cast<float*>(p.out) + first);
      } else {
        decode4(p.codes + first / 2, n, kNf4, scale, true, buffer);
        narrow(buffer, n, static_cast<uint16_t*>(p.out) + first);
      }
    }
  });
}

}  // namespace lc_qlora
