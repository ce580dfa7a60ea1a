/* Micro-kernels of the CPU GEMM: one tile of c, accumulated in registers; and the packing that feeds them. One set per instruction set. */
#ifndef LCTX_GEMM_MICRO_H
#define LCTX_GEMM_MICRO_H
#include <cstdint>

namespace lctx::cpu {

/* c[rows, columns] = alpha * a b + beta * c. The sum over k is one fused multiply-add per step, in order, in every kernel: an element's bits do not
 * depend on where its tile lies, on how the operands are stored, or on how many threads there are. */
struct MicroArgs {
  int64_t k;
  const float* a;
  int64_t a_step; /* rows adjacent in memory: elements from one k to the next. k adjacent: elements from one row to the next. */
  const float* b;
  int64_t b_step; /* elements from one k to the next; columns are adjacent */
  float* c;
  int64_t ldc;
  int32_t tail; /* valid columns of the last vector; the kernels for whole vectors ignore it */
  float alpha, beta;
};
using MicroFn = void (*)(const MicroArgs&);

constexpr int kMaxRows = 14, kMaxVectors = 2;

struct Micro {
  int mr, width;                            /* most rows of a tile; floats of a vector */
  MicroFn fn[2][2][kMaxVectors][kMaxRows];  /* [k adjacent in a][tail][vectors - 1][rows - 1] */
  /* dst[p * stride + i] = src[i * ld + p], i < rows <= stride, p < k. May write up to 16 floats past the last row's end. */
  void (*pack_transposed)(const float* src, int64_t ld, int64_t rows, int64_t k, float* dst, int64_t stride);
  /* dst[p * stride + i] = src[p * ld + i], i < count <= stride, p < k. May write up to 16 floats past the end. */
  void (*pack_straight)(const float* src, int64_t ld, int64_t count, int64_t k, float* dst, int64_t stride);
  int nr() const { return width * kMaxVectors; }
};

const Micro& micro(); /* the widest that this CPU runs */

/* What gemm_avx512.cc, gemm_avx2.cc and gemm_portable.cc provide. */
extern const Micro kMicroAvx512, kMicroAvx2, kMicroPortable;

}  // namespace lctx::cpu
#endif
