/* Micro-kernels of the CPU GEMM: a tile of c from packed panels of a and b, accumulated in registers. */
#ifndef LCTX_GEMM_MICRO_H
#define LCTX_GEMM_MICRO_H
#include <cstdint>

namespace lctx::cpu {

struct MicroArgs {
  int64_t kc;
  const float* a; /* packed [kc][mr] */
  const float* b; /* packed [kc][nr], zero-padded */
  float* c;
  int64_t ldc;
  int64_t n; /* valid columns of the tile, <= nr */
  float alpha, beta;
};
using MicroFn = void (*)(const MicroArgs&);

/* rows[m - 1] computes m valid rows. */
struct Micro {
  int mr, nr;
  const MicroFn* rows;
};
const Micro& micro(); /* the widest that this CPU runs */

/* dst[k * stride + r] = src[r * ld + k], for r < rows, k < depth: the packing that transposes. */
void pack_transposed(const float* src, int64_t ld, int64_t rows, int64_t depth, float* dst, int64_t stride);

}  // namespace lctx::cpu
#endif
