/* MXFP4: OCP Microscaling Formats 1.0, blocks of 32 E2M1 elements and an E8M0 scale, in gpt-oss's checkpoint layout. */
#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "lctx/napi_glue.h"
#include "quant.h"

namespace lc_qlora {

const float kE2m1[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

namespace {

/* Codes of one block, times a power of two: nearest E2M1, ties to the even code, above 6 saturating. The number of midpoints below a magnitude; at a
 * midpoint above an odd code, one more. */
__attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"))) void encode(const float* x, float factor, int32_t* codes) {
  static const float even[4] = {0.25f, 1.25f, 2.5f, 5.0f}, odd[3] = {0.75f, 1.75f, 3.5f};
  for (int64_t i = 0; i < kMxBlock; i++) {
    const float v = std::fabs(x[i] * factor);
    int32_t code = 0;
    for (int k = 0; k < 4; k++) code += v > even[k];
    for (int k = 0; k < 3; k++) code += v >= odd[k];
    codes[i] = code | static_cast<int32_t>((to_bits(x[i]) >> 31) << 3);
  }
}

}  // namespace

bool mxfp4_quantize(const Mxfp4& p) {
  bool finite = true;
  lctx::parallel(0, p.n / kMxBlock, 512, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      float x[kMxBlock];
      load_block(p.values, p.dtype, b * kMxBlock, kMxBlock, x);
      uint32_t bits = 0;
      for (int64_t i = 0; i < kMxBlock; i++) bits = std::max(bits, to_bits(x[i]) & 0x7fffffffu);
      const float largest = from_bits(bits);
      if (!std::isfinite(largest)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      // The exponent of the largest magnitude, less that of 6.0 = 1.5 * 2^2.
      const int exponent = largest > 0 && std::isfinite(largest) ? std::clamp(std::ilogb(largest) - 2, -127, 127) : -127;
      p.scales[b] = static_cast<uint8_t>(exponent + 127);
      // 2^-exponent is exact, a subnormal included; a product that underflows rounds to zero anyway.
      const float factor = exponent == 127 ? 0x1p-127f : from_bits(static_cast<uint32_t>(127 - exponent) << 23);
      int32_t codes[kMxBlock];
      encode(x, factor, codes);
      uint8_t* out = p.blocks + b * (kMxBlock / 2);
      for (int64_t i = 0; i < kMxBlock / 2; i++) out[i] = static_cast<uint8_t>(codes[2 * i] | (codes[2 * i + 1] << 4));
    }
  });
  return finite;
}

void mxfp4_dequantize(const Mxfp4& p) {
  lctx::parallel(0, p.n / kMxBlock, 1024, [&](int64_t begin, int64_t end) {
    float buffer[kMxBlock];
    for (int64_t b = begin; b < end; b++) {
      const uint32_t e = p.scales[b];
      const float scale = e == 255 ? std::numeric_limits<float>::quiet_NaN() : e == 0 ? 0x1p-127f : from_bits(e << 23);
      const uint8_t* codes = p.blocks + b * (kMxBlock / 2);
      if (p.dtype == LCTX_F32) {
        decode4(codes, kMxBlock, kE2m1, scale, false, static_cast<float*>(p.values) + b * kMxBlock);
      } else {
        decode4(codes, kMxBlock, kE2m1, scale, false, buffer);
        narrow(buffer, kMxBlock, static_cast<uint16_t*>(p.values) + b * kMxBlock);
      }
    }
  });
}

}  // namespace lc_qlora
