#include "half.h"

/* By instruction set, not by CPU model: a model's name would match one vendor only. */
#define LCTX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))

namespace lctx::cpu {

LCTX_CLONES void bf16_to_f32_row(float* dst, const uint16_t* src, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i] = bf16_to_f32(src[i]);
}
LCTX_CLONES void f16_to_f32_row(float* dst, const uint16_t* src, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i] = f16_to_f32(src[i]);
}
LCTX_CLONES void f32_to_bf16_row(uint16_t* dst, const float* src, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i] = f32_to_bf16(src[i]);
}
LCTX_CLONES void f32_to_f16_row(uint16_t* dst, const float* src, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i] = f32_to_f16(src[i]);
}

}  // namespace lctx::cpu
