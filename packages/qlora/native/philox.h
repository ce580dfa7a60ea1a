/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the same numbers for the same counter, in any order. */
#ifndef LC_QLORA_PHILOX_H
#define LC_QLORA_PHILOX_H
#include <cstdint>

namespace lc_qlora {

/* `lanes` counters (c0 + lane, c1, c2, c3) at once; out[word][lane]. */
template <int lanes>
inline __attribute__((always_inline)) void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, uint32_t out[4][lanes]) {
  for (int i = 0; i < lanes; i++) {
    out[0][i] = c0 + static_cast<uint32_t>(i);
    out[1][i] = c1;
    out[2][i] = c2;
    out[3][i] = c3;
  }
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < lanes; i++) {
      const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * out[0][i], b = static_cast<uint64_t>(0xCD9E8D57u) * out[2][i];
      out[0][i] = static_cast<uint32_t>(b >> 32) ^ out[1][i] ^ k0;
      out[1][i] = static_cast<uint32_t>(b);
      out[2][i] = static_cast<uint32_t>(a >> 32) ^ out[3][i] ^ k1;
      out[3][i] = static_cast<uint32_t>(a);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace lc_qlora
#endif
