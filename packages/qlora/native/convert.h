/* f32 <-> bf16 and f16 for blocks; loops that the compiler vectorises. Round to nearest even; NaN stays NaN. */
#ifndef LC_QLORA_CONVERT_H
#define LC_QLORA_CONVERT_H
#include <cstdint>
#include <cstring>

#include "lctx/abi.h"

namespace lc_qlora {

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline uint16_t to_bf16(float f) {
  const uint32_t bits = to_bits(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -tiny : tiny;
}

/* Elements first .. first+n of x as floats. */
inline void load_block(const void* x, int32_t dtype, int64_t first, int64_t n, float* out) {
  if (dtype == LCTX_F32) {
    std::memcpy(out, static_cast<const float*>(x) + first, static_cast<size_t>(n) * 4);
  } else if (dtype == LCTX_BF16) {
    const uint16_t* h = static_cast<const uint16_t*>(x) + first;
    for (int64_t i = 0; i < n; i++) out[i] = from_bits(static_cast<uint32_t>(h[i]) << 16);
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(x) + first;
    for (int64_t i = 0; i < n; i++) out[i] = from_f16(h[i]);
  }
}

}  // namespace lc_qlora
#endif
