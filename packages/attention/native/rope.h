/* Rotary position embedding on the CPU, rotate-half convention (Hugging Face): dims j and j + rotary / 2 of a head form a pair. */
#ifndef LC_ROPE_H
#define LC_ROPE_H
#include <cstdint>
#include "lctx/abi.h"

namespace attention {

constexpr int64_t kMaxPairs = 512;  // head dims up to 1024

struct Rope {
  int64_t n, heads, dim, pairs, start;
  float* x;         // [n, heads, dim], rotated in place
  int64_t stride;   // elements between tokens
  const int32_t* doc_start;  // [n] or null; position = start + i - doc_start[i]
  const double* inv_freq;    // [pairs]
  double factor;    // multiplies cos and sin (YaRN's attention factor)
  bool transpose;   // backward: the transposed map (the inverse rotation, times the same factor)
};

void rope(const Rope& r, const lctx_api* api);

}  // namespace attention
#endif
