/* f32 GEMM on the CPU, blocked and packed as in Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
 * k is never split across threads and its blocks come in order, so an element's bits do not depend on the number of threads. */
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu_kernels.h"
#include "gemm_micro.h"
#include "runtime.h"

namespace lctx::cpu {
namespace {

constexpr int64_t KC = 256;  // a b panel of KC x 32 floats is 32 KiB: one L1
constexpr int64_t NC = 1024; // KC x NC of b: 1 MiB
constexpr int64_t MC = 168;  // MC x KC of a: 168 KiB, in L2; a multiple of 14, 6 and 4

/* Per thread, made once: the caller's b block, and each task's a block. */
struct Buffers {
  float* a = static_cast<float*>(std::aligned_alloc(64, MC * KC * sizeof(float)));
  float* b = static_cast<float*>(std::aligned_alloc(64, KC * (NC + 32) * sizeof(float)));
  ~Buffers() {
    std::free(a);
    std::free(b);
  }
};
Buffers& buffers() {
  static thread_local Buffers mine;
  return mine;
}

/* b[kc, nc] into panels [nc / nr][kc][nr], the last one zero-padded. */
void pack_b(const float* b, int64_t ldb, bool transposed, int64_t kc, int64_t nc, int nr, float* out) {
  const int64_t panels = (nc + nr - 1) / nr;
  parallel(0, panels, std::max<int64_t>(1, 65536 / (kc * nr)), [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
      const int64_t j = panel * nr, n = std::min<int64_t>(nr, nc - j);
      float* dst = out + panel * kc * nr;
      if (n < nr) std::memset(dst, 0, static_cast<size_t>(kc * nr) * sizeof(float));
      if (transposed) {
        pack_transposed(b + j * ldb, ldb, n, kc, dst, nr);
      } else {
        for (int64_t k = 0; k < kc; k++) std::memcpy(dst + k * nr, b + k * ldb + j, static_cast<size_t>(n) * sizeof(float));
      }
    }
  });
}

/* a[mc, kc] into panels [mc / mr][kc][mr]; rows beyond mc are not read by the micro-kernels. */
void pack_a(const float* a, int64_t lda, bool transposed, int64_t mc, int64_t kc, int mr, float* out) {
  for (int64_t i = 0; i < mc; i += mr) {
    const int64_t m = std::min<int64_t>(mr, mc - i);
    float* dst = out + i * kc;
    if (transposed) {
      for (int64_t k = 0; k < kc; k++) std::memcpy(dst + k * mr, a + k * lda + i, static_cast<size_t>(m) * sizeof(float));
    } else {
      pack_transposed(a + i * lda, lda, m, kc, dst, mr);
    }
  }
}

void scale_only(float* c, int64_t ldc, int64_t m, int64_t n, float beta) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) c[i * ldc + j] = beta == 0 ? 0.0f : c[i * ldc + j] * beta;
}

void gemm_f32(const float* a, int64_t lda, bool ta, const float* b, int64_t ldb, bool tb, float* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
              float alpha, float beta) {
  if (m <= 0 || n <= 0) return;
  if (k <= 0 || alpha == 0) return scale_only(c, ldc, m, n, beta);
  const Micro& mk = micro();
  float* packed_b = buffers().b;
  const int64_t threads = inside_parallel() ? 1 : num_threads();
  for (int64_t jc = 0; jc < n; jc += NC) {
    const int64_t nc = std::min(NC, n - jc);
    const int64_t panels = (nc + mk.nr - 1) / mk.nr;
    for (int64_t pc = 0; pc < k; pc += KC) {
      const int64_t kc = std::min(KC, k - pc);
      pack_b(tb ? b + jc * ldb + pc : b + pc * ldb + jc, ldb, tb, kc, nc, mk.nr, packed_b);
      const float block_beta = pc == 0 ? beta : 1.0f;
      // Tasks: row blocks; split the columns as well when there are too few of those.
      const int64_t row_blocks = (m + MC - 1) / MC;
      const int64_t column_blocks = std::min(panels, row_blocks >= threads * 2 ? 1 : (threads * 2 + row_blocks - 1) / row_blocks);
      const int64_t work = m * nc * kc;
      const int64_t tasks = work < 262144 ? 1 : row_blocks * column_blocks;
      const int64_t per_column = tasks == 1 ? panels : (panels + column_blocks - 1) / column_blocks;
      auto task = [&](int64_t row_first, int64_t row_last, int64_t panel_first, int64_t panel_last) {
        float* packed_a = buffers().a;
        for (int64_t ic = row_first; ic < row_last; ic += MC) {
          const int64_t mc = std::min(MC, row_last - ic);
          pack_a(ta ? a + pc * lda + ic : a + ic * lda + pc, lda, ta, mc, kc, mk.mr, packed_a);
          for (int64_t panel = panel_first; panel < panel_last; panel++) {
            MicroArgs args{kc, nullptr, packed_b + panel * kc * mk.nr, nullptr, ldc, std::min<int64_t>(mk.nr, nc - panel * mk.nr), alpha, block_beta};
            for (int64_t i = 0; i < mc; i += mk.mr) {
              args.a = packed_a + i * kc;
              args.c = c + (ic + i) * ldc + jc + panel * mk.nr;
              mk.rows[std::min<int64_t>(mk.mr, mc - i) - 1](args);
            }
          }
        }
      };
      if (tasks == 1) {
        task(0, m, 0, panels);
      } else {
        parallel(0, tasks, 1, [&](int64_t first, int64_t last) {
          for (int64_t t = first; t < last; t++) {
            const int64_t row = t / column_blocks * MC, panel = t % column_blocks * per_column;
            if (panel < panels) task(row, std::min(m, row + MC), panel, std::min(panels, panel + per_column));
          }
        });
      }
    }
  }
}

}  // namespace

int gemm(const lctx_gemm_params* p) {
  if (p->a_dtype != LCTX_F32 || p->b_dtype != LCTX_F32 || p->c_dtype != LCTX_F32)
    return set_error("ERR_LC_DTYPE", "gemm: the CPU computes in f32; cast a, b and c to f32 first");
  gemm_f32(static_cast<const float*>(p->a), p->lda, p->trans_a, static_cast<const float*>(p->b), p->ldb, p->trans_b, static_cast<float*>(p->c), p->ldc,
           p->m, p->n, p->k, p->alpha, p->beta);
  return 0;
}

int grouped_gemm(const lctx_grouped_gemm_params* p) {
  if (p->a_dtype != LCTX_F32 || p->b_dtype != LCTX_F32 || p->c_dtype != LCTX_F32)
    return set_error("ERR_LC_DTYPE", "groupedGemm: the CPU computes in f32; cast a, b and c to f32 first");
  const float* a = static_cast<const float*>(p->a);
  const float* b = static_cast<const float*>(p->b);
  float* c = static_cast<float*>(p->c);
  int64_t before = 0;
  for (int32_t e = 0; e <= p->experts; e++) {
    if (p->offsets[e] < before || p->offsets[e] > p->rows)
      return set_error("ERR_LC_ARGUMENT", "groupedGemm: offsets must not decrease and must stay within 0..rows");
    before = p->offsets[e];
  }
  auto expert = [&](int64_t e) {
    const int64_t first = p->offsets[e], rows = p->offsets[e + 1] - first;
    if (p->mode == 0) {
      gemm_f32(a + first * p->lda, p->lda, false, b + e * p->stride_b, p->ldb, p->trans_b, c + first * p->ldc, p->ldc, rows, p->n, p->k, p->alpha, p->beta);
    } else {
      gemm_f32(a + first * p->lda, p->lda, true, b + first * p->ldb, p->ldb, false, c + e * p->stride_c, p->ldc, p->m, p->n, rows, p->alpha, p->beta);
    }
  };
  // Many small experts: one thread each. Few or large ones: all threads on each.
  const bool spread = p->experts >= 4 * num_threads();
  if (spread) {
    parallel(0, p->experts, 1, [&](int64_t first, int64_t last) {
      for (int64_t e = first; e < last; e++) expert(e);
    });
  } else {
    for (int64_t e = 0; e < p->experts; e++) expert(e);
  }
  return 0;
}

}  // namespace lctx::cpu
