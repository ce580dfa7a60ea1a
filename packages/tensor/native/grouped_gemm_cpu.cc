/* One GEMM per expert. Tasks are blocks of rows (and of columns, if those are few) of one expert, so that all threads work whether the rows lie in
 * one expert or in all of them; each task is a serial gemm_f32. Bits do not depend on the division (gemm_cpu.cc). */
#include <algorithm>

#include "cpu_kernels.h"
#include "gemm_cpu.h"
#include "runtime.h"

namespace lctx::cpu {
namespace {

constexpr int64_t kRows = 168;    // of c per task: one packed block of a
constexpr int64_t kColumns = 128; // at least, per task

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Runs `task(expert, first row of c, rows, first column, columns)` over every expert's [rows_of(e), n]. */
template <class RowsOf, class Task>
void each_block(int64_t experts, int64_t n, const RowsOf& rows_of, const Task& task) {
  int64_t blocks = 0;
  for (int64_t e = 0; e < experts; e++) blocks += ceil_div(rows_of(e), kRows);
  if (blocks == 0 || n == 0) return;
  const int64_t threads = inside_parallel() ? 1 : num_threads();
  const int64_t splits = threads == 1 ? 1 : std::clamp<int64_t>(ceil_div(threads * 4, blocks), 1, ceil_div(n, kColumns));
  const int64_t columns = ceil_div(ceil_div(n, splits), 32) * 32;
  parallel(0, blocks * splits, 1, [&](int64_t first, int64_t last) {
    int64_t at = 0;  // number of the expert's first task
    for (int64_t e = 0; e < experts && at < last; e++) {
      const int64_t rows = rows_of(e), mine = ceil_div(rows, kRows) * splits;
      for (int64_t t = std::max(first, at); t < std::min(last, at + mine); t++) {
        const int64_t i = (t - at) / splits * kRows, j = (t - at) % splits * columns;
        if (j < n) task(e, i, std::min(kRows, rows - i), j, std::min(columns, n - j));
      }
      at += mine;
    }
  });
}

}  // namespace

int grouped_gemm(const lctx_grouped_gemm_params* p) {
  if (p->a_dtype != LCTX_F32 || p->b_dtype != LCTX_F32 || p->c_dtype != LCTX_F32)
    return set_error("ERR_LC_DTYPE", "groupedGemm: the CPU computes in f32; cast a, b and c to f32 first");
  const int32_t* offsets = p->offsets;
  int64_t before = 0;
  for (int32_t e = 0; e <= p->experts; e++) {
    if (offsets[e] < before || offsets[e] > p->rows)
      return set_error("ERR_LC_ARGUMENT", "groupedGemm: offsets must not decrease and must stay within 0 .. rows of a");
    before = offsets[e];
  }
  const Matrix a{static_cast<const float*>(p->a), p->lda, p->mode == 1};
  const float* b = static_cast<const float*>(p->b);
  float* c = static_cast<float*>(p->c);
  const auto rows_of = [&](int64_t e) -> int64_t { return offsets[e + 1] - offsets[e]; };
  if (p->mode == 0) {
    each_block(p->experts, p->n, rows_of, [&](int64_t e, int64_t i, int64_t rows, int64_t j, int64_t columns) {
      const int64_t row = offsets[e] + i;
      const Matrix be{b + e * p->stride_b, p->ldb, p->trans_b != 0};
      gemm_f32(a.at(row, 0), be.at(0, j), c + row * p->ldc + j, p->ldc, rows, columns, p->k, p->alpha, p->beta);
    });
  } else {
    const auto all = [&](int64_t) { return p->m; };
    each_block(p->experts, p->n, all, [&](int64_t e, int64_t i, int64_t rows, int64_t j, int64_t columns) {
      const Matrix be{b, p->ldb, false};
      gemm_f32(a.at(i, offsets[e]), be.at(offsets[e], j), c + e * p->stride_c + i * p->ldc + j, p->ldc, rows, columns, rows_of(e), p->alpha, p->beta);
    });
  }
  return 0;
}

}  // namespace lctx::cpu
