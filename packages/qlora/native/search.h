/* The 8-bit dynamic data type (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015) and the search in it. */
#ifndef LC_QLORA_SEARCH_H
#define LC_QLORA_SEARCH_H
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace lc_qlora {

/* 256 rising values. Each decade 10^-6 .. 10^0 is divided linearly from 0.1 to 1, with twice as many values as the decade below: the middles of those
 * intervals, with both signs or (unsigned) twice as many. Added to them are 0 and 1. */
struct Map256 {
  float values[256];
  float middle[256]; /* middle[i]: halfway between values i and i + 1; the last is never passed */

  explicit Map256(bool is_signed) {
    int n = 0;
    values[n++] = 0;
    values[n++] = 1;
    for (int decade = 0; decade < 7; decade++) {
      const int count = 1 << (is_signed ? decade : decade + 1);
      const double scale = std::pow(10.0, decade - 6);
      for (int i = 0; i < count; i++) {
        const double value = scale * (0.1 + 0.9 * (i + 0.5) / count);
        values[n++] = static_cast<float>(value);
        if (is_signed) values[n++] = static_cast<float>(-value);
      }
    }
    std::sort(values, values + 256);
    for (int i = 0; i < 255; i++) middle[i] = (values[i] + values[i + 1]) * 0.5f;
    middle[255] = 0;
  }
  /* A tie takes the lower value. */
  uint8_t nearest(float x) const {
    int at = 0; /* values below `at` are too small */
    for (int step = 128; step; step >>= 1) at += x > middle[at + step - 1] ? step : 0;
    return static_cast<uint8_t>(at);
  }
};

inline const Map256& signed_map() {
  static const Map256 map(true);
  return map;
}
inline const Map256& unsigned_map() {
  static const Map256 map(false);
  return map;
}

}  // namespace lc_qlora
#endif
