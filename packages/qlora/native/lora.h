/* What LoRA needs besides GEMM. Plain C++: no napi. */
#ifndef LC_QLORA_LORA_H
#define LC_QLORA_LORA_H
#include <cstdint>

namespace lc_qlora {

/* out[t, f] (+)= keep(t, f) ? x[t, f] / (1 - p) : 0. Word f % 4 of Philox at counter (f / 4, token, token >> 32, site) with key seed decides:
 * it is kept when the word is >= threshold = p * 2^32. Token t is start + t: a recomputed span draws the same. */
struct Dropout {
  const float* x;
  float* out;
  int64_t rows, width, x_stride, out_stride;
  uint64_t seed, start;
  uint32_t site, threshold;
  float scale;
  bool accumulate;
};
void dropout(const Dropout& p);

/* out[i] uniform in [low, high), 24 bits each, from Philox at counter (i / 4, site, 0, 1) with key seed. */
struct Uniform {
  float* out;
  int64_t n;
  uint64_t seed;
  uint32_t site;
  float low, high;
};
void uniform(const Uniform& p);

/* PEFT stores lora_B of fused experts as [out, r * experts], column = rank * experts + expert.
 * gather: grouped[e][o][k] = b[o][k * experts + e];  scatter: b[o][k * experts + e] += grouped[e][o][k]. */
struct ExpertB {
  float* b;
  float* grouped;
  int64_t experts, out, rank;
};
void gather_expert_b(const ExpertB& p);
void scatter_expert_b(const ExpertB& p);

}  // namespace lc_qlora
#endif
