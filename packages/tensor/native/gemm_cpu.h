/* The f32 GEMM under `gemm` and `grouped_gemm`. */
#ifndef LCTX_GEMM_CPU_H
#define LCTX_GEMM_CPU_H
#include <cstdint>

namespace lctx::cpu {

/* A row-major matrix and how it is used: element (i, j) of op(x) is p[i * ld + j], or p[j * ld + i] when transposed. */
struct Matrix {
  const float* p;
  int64_t ld;
  bool transposed;
  Matrix at(int64_t i, int64_t j) const { return {p + (transposed ? j * ld + i : i * ld + j), ld, transposed}; }
};

/* c[m, n] = alpha * op(a)[m, k] * op(b)[k, n] + beta * c; over all threads, or serially inside a parallel range. */
void gemm_f32(const Matrix& a, const Matrix& b, float* c, int64_t ldc, int64_t m, int64_t n, int64_t k, float alpha, float beta);

}  // namespace lctx::cpu
#endif
