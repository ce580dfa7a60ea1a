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

/* Nearest E2M1 magnitude, ties to the even code, above 6 saturating. */
int encode_magnitude(float v) {
  int code = 0;
  for (int k = 0; k < 7; k++) {
    const float middle = (kE2m1[k] + kE2m1[k + 1]) * 0.5f;
    code += k & 1 ? v >= middle : v > middle;
  }
  return code;
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
      uint8_t* out = p.blocks + b * (kMxBlock / 2);
      for (int64_t i = 0; i < kMxBlock / 2; i++) {
        int pair = 0;
        for (int half = 0; half < 2; half++) {
          const float v = std::ldexp(x[2 * i + half], -exponent);
          pair |= (encode_magnitude(std::fabs(v)) | (std::signbit(v) ? 8 : 0)) << (4 * half);
        }
        out[i] = static_cast<uint8_t>(pair);
      }
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
        uint16_t* out = static_cast<uint16_t*>(p.values) + b * kMxBlock;
        for (int64_t i = 0; i < kMxBlock; i++) out[i] = to_bf16(buffer[i]);
      }
    }
  });
}

}  // namespace lc_qlora
