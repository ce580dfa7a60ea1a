/* bf16 and f16 conversions, round to nearest even; NaN stays NaN. Without branches, so that loops over them vectorise. */
#ifndef LCTX_HALF_H
#define LCTX_HALF_H
#include <bit>
#include <cstdint>

namespace lctx {

inline float bf16_to_f32(uint16_t h) { return std::bit_cast<float>(static_cast<uint32_t>(h) << 16); }

inline uint16_t f32_to_bf16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

inline float f16_to_f32(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  // Exponent and mantissa in f32's place are the value times 2^-112, subnormals included; the product is exact.
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  return std::bit_cast<float>(bits | static_cast<uint32_t>(h & 0x8000u) << 16);
}

inline uint16_t f32_to_f16(float f) {
  const uint32_t all = std::bit_cast<uint32_t>(f), bits = all & 0x7fffffffu;
  const uint32_t normal = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;  // may carry into infinity, as it should
  // Below 2^-14: ulp(0.5) = 2^-24, so this addition rounds to f16's subnormals.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
  uint32_t r = bits < 0x38800000u ? subnormal : normal;
  r = bits >= 0x47800000u ? 0x7c00u : r;  // >= 65536, and infinity
  r = bits > 0x7f800000u ? 0x7e00u : r;
  return static_cast<uint16_t>(r | (all >> 16 & 0x8000u));
}

namespace cpu {
/* Rows, vectorised for the CPU at hand (half_rows.cc). */
void bf16_to_f32_row(float* dst, const uint16_t* src, int64_t n);
void f16_to_f32_row(float* dst, const uint16_t* src, int64_t n);
void f32_to_bf16_row(uint16_t* dst, const float* src, int64_t n);
void f32_to_f16_row(uint16_t* dst, const float* src, int64_t n);
}  // namespace cpu

}  // namespace lctx
#endif
