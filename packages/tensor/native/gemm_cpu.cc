/* f32 GEMM on the CPU: blocked and packed after Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with two additions
 * for small operands: what is read only a few times is read where it lies, and few rows take one parallel region instead of two.
 *
 * Tasks divide rows and columns, never k, and k's blocks depend on k alone and come in order. So an element's bits depend on its row of a, its column
 * of b and k, and on neither the number of threads nor m and n: tiles of a matrix multiply to the same bits as the whole. */
#include "gemm_cpu.h"

#include <algorithm>

#include "cpu_kernels.h"
#include "gemm_micro.h"
#include "runtime.h"
#include "scratch.h"

namespace lctx::cpu {
namespace {

constexpr int64_t kDepth = 320;        // of k per block; a panel of 32 columns is 40 KiB
constexpr int64_t kRowBlock = 168;     // rows of a packed at once: 210 KiB, in L2; a multiple of 14, 6 and 4
constexpr int64_t kColumnBlock = 2048; // columns of b packed at once: 2.5 MiB, in L3
constexpr int64_t kTaskWork = 1 << 16; // multiply-adds below which a task is not worth a thread
constexpr int64_t kSlack = 16;         // floats that packing may write past the end

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

thread_local Scratch t_a, t_panel, t_block;

/* Rows whose addresses differ by a multiple of a page share one set of the L1 cache: a tile's rows would evict each other. */
bool collides(int64_t ld) { return ld % 1024 == 0; }

/* One GEMM, and what its tasks share. */
struct Job {
  const Micro& mk = micro();
  Matrix a, b;
  float* c;
  int64_t ldc, m, n, k;
  float alpha, beta;
  int64_t depth = ceil_div(k, ceil_div(k, kDepth));  // equal blocks of k

  int64_t vectors(int64_t columns) const { return ceil_div(columns, mk.width); }
};

/* rows x one panel of b, all operands given for one block of k. `a` is packed (panels of mr rows, adjacent) or where it lies. */
struct Panel {
  const Job& job;
  const float* a;
  int64_t rows, a_step, a_tile; /* a_tile: elements from one tile of mr rows to the next; packed: 0, the tile's own size */
  bool k_adjacent;
  int64_t k;
  float beta;

  void run(const float* b, int64_t b_step, int64_t columns, float* c) const {
    const Micro& mk = job.mk;
    const int64_t nv = job.vectors(columns);
    const int32_t tail = static_cast<int32_t>(columns - (nv - 1) * mk.width);
    const MicroFn* fn = mk.fn[k_adjacent][tail != mk.width][nv - 1];
    MicroArgs args{k, a, a_step, b, b_step, c, job.ldc, tail, job.alpha, beta};
    const bool packed = a_tile == 0;
    for (int64_t i = 0; i < rows; i += mk.mr) {
      const int64_t mr = std::min<int64_t>(mk.mr, rows - i);
      if (packed) args.a_step = mr;
      fn[mr - 1](args);
      args.a += packed ? mr * k : a_tile;
      args.c += mr * job.ldc;
    }
  }
};

/* Rows of a for one block of k and `columns` columns: packed into `buffer` where they are read often, else where they lie. */
Panel prepare_a(const Job& job, int64_t row, int64_t rows, int64_t p, int64_t kc, int64_t columns) {
  const Matrix a = job.a.at(row, p);
  const Micro& mk = job.mk;
  const float beta = p == 0 ? job.beta : 1.0f;
  // As it lies, a transposed operand costs a cache line per k and tile; a plain one costs only address arithmetic.
  const bool in_place = a.transposed ? columns <= mk.nr() || a.ld <= 2 * mk.mr : columns <= 3 * mk.nr() && !collides(a.ld);
  if (in_place) return {job, a.p, rows, a.ld, a.transposed ? mk.mr : mk.mr * a.ld, !a.transposed, kc, beta};
  float* packed = t_a.get(round_up(rows, mk.mr) * kc + kSlack);
  for (int64_t i = 0; i < rows; i += mk.mr) {
    const int64_t mr = std::min<int64_t>(mk.mr, rows - i);
    if (a.transposed) mk.pack_straight(a.p + i, a.ld, mr, kc, packed + i * kc, mr);
    else mk.pack_transposed(a.p + i * a.ld, a.ld, mr, kc, packed + i * kc, mr);
  }
  return {job, packed, rows, 0, 0, false, kc, beta};
}

void pack_b(const Job& job, const Matrix& b, int64_t columns, int64_t kc, float* out) {
  const int64_t stride = job.vectors(columns) * job.mk.width;
  if (b.transposed) job.mk.pack_transposed(b.p, b.ld, columns, kc, out, stride);
  else job.mk.pack_straight(b.p, b.ld, columns, kc, out, stride);
}

/* At most kRowBlock rows: each task takes some panels of b (and, if those are few, some rows), one after the other while they are in cache. */
void few_rows(const Job& job, int64_t tasks) {
  const Micro& mk = job.mk;
  const int64_t panels = ceil_div(job.n, mk.nr()), tiles = ceil_div(job.m, mk.mr);
  const int64_t column_tasks = std::min(panels, tasks), row_tasks = std::min(tiles, ceil_div(tasks, column_tasks));
  parallel(0, column_tasks * row_tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const int64_t ct = task / row_tasks, rt = task % row_tasks;
      const int64_t j0 = panels * ct / column_tasks * mk.nr(), j1 = std::min(job.n, panels * (ct + 1) / column_tasks * mk.nr());
      const int64_t i0 = tiles * rt / row_tasks * mk.mr, i1 = std::min(job.m, tiles * (rt + 1) / row_tasks * mk.mr);
      for (int64_t p = 0; p < job.k; p += job.depth) {
        const int64_t kc = std::min(job.depth, job.k - p);
        const Panel panel = prepare_a(job, i0, i1 - i0, p, kc, j1 - j0);
        const bool in_place = !job.b.transposed && (i1 - i0 <= mk.mr || (i1 - i0 <= 6 * mk.mr && !collides(job.b.ld)));
        for (int64_t j = j0; j < j1; j += mk.nr()) {
          const int64_t columns = std::min<int64_t>(mk.nr(), j1 - j);
          const Matrix b = job.b.at(p, j);
          float* c = job.c + i0 * job.ldc + j;
          if (in_place) {
            panel.run(b.p, b.ld, columns, c);
          } else {
            float* packed = t_panel.get(mk.nr() * kc + kSlack);
            pack_b(job, b, columns, kc, packed);
            panel.run(packed, job.vectors(columns) * mk.width, columns, c);
          }
        }
      }
    }
  });
}

/* Many rows: a block of b is packed once, by all threads, then tasks take blocks of rows (and of columns, if rows are few). */
void many_rows(const Job& job, int64_t tasks) {
  const Micro& mk = job.mk;
  const int64_t nr = mk.nr();
  float* packed = t_block.get(round_up(std::min(job.n, kColumnBlock), nr) * job.depth + kSlack);
  for (int64_t jc = 0; jc < job.n; jc += kColumnBlock) {
    const int64_t nc = std::min(kColumnBlock, job.n - jc), panels = ceil_div(nc, nr);
    for (int64_t p = 0; p < job.k; p += job.depth) {
      const int64_t kc = std::min(job.depth, job.k - p);
      parallel(0, panels, std::max<int64_t>(1, 32768 / (kc * nr)), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) pack_b(job, job.b.at(p, jc + i * nr), std::min(nr, nc - i * nr), kc, packed + i * nr * kc);
      });
      const int64_t blocks = std::max(ceil_div(job.m, kRowBlock), std::min(tasks, job.m / (4 * mk.mr)));
      const int64_t rows = round_up(ceil_div(job.m, blocks), mk.mr);
      const int64_t row_tasks = ceil_div(job.m, rows), column_tasks = std::min(panels, std::max<int64_t>(1, tasks / 2 / row_tasks));
      parallel(0, row_tasks * column_tasks, 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; task++) {
          const int64_t i0 = task / column_tasks * rows, ct = task % column_tasks;
          const int64_t j0 = panels * ct / column_tasks * nr, j1 = std::min(nc, panels * (ct + 1) / column_tasks * nr);
          const Panel panel = prepare_a(job, i0, std::min(rows, job.m - i0), p, kc, j1 - j0);
          for (int64_t j = j0; j < j1; j += nr) {
            const int64_t columns = std::min(nr, j1 - j);
            panel.run(packed + j * kc, job.vectors(columns) * mk.width, columns, job.c + i0 * job.ldc + jc + j);
          }
        }
      });
    }
  }
}

void scale_rows(float* c, int64_t ldc, int64_t m, int64_t n, float beta) {
  parallel(0, m, std::max<int64_t>(1, 65536 / n), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      float* row = c + i * ldc;
      if (beta == 0) std::fill(row, row + n, 0.0f);
      else for (int64_t j = 0; j < n; j++) row[j] *= beta;
    }
  });
}

}  // namespace

void gemm_f32(const Matrix& a, const Matrix& b, float* c, int64_t ldc, int64_t m, int64_t n, int64_t k, float alpha, float beta) {
  if (m <= 0 || n <= 0) return;
  if (k <= 0 || alpha == 0) return beta == 1 ? void() : scale_rows(c, ldc, m, n, beta);
  const Job job{.a = a, .b = b, .c = c, .ldc = ldc, .m = m, .n = n, .k = k, .alpha = alpha, .beta = beta};
  const int64_t threads = inside_parallel() ? 1 : num_threads();
  // Several tasks per thread even out what else runs on the machine.
  const int64_t tasks = threads == 1 ? 1 : std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(m) * n * k / kTaskWork), 1, threads * 4);
  if (m <= kRowBlock) few_rows(job, tasks);
  else many_rows(job, tasks);
}

int gemm(const lctx_gemm_params* p) {
  if (p->a_dtype != LCTX_F32 || p->b_dtype != LCTX_F32 || p->c_dtype != LCTX_F32)
    return set_error("ERR_LC_DTYPE", "gemm: the CPU computes in f32; cast a, b and c to f32 first");
  gemm_f32({static_cast<const float*>(p->a), p->lda, p->trans_a != 0}, {static_cast<const float*>(p->b), p->ldb, p->trans_b != 0},
           static_cast<float*>(p->c), p->ldc, p->m, p->n, p->k, p->alpha, p->beta);
  return 0;
}

}  // namespace lctx::cpu
