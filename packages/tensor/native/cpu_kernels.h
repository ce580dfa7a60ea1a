/* CPU side of @lc/tensor: thread pool, GEMM, row ops. Plain C++; params structs hold raw pointers that the caller has checked. */
#ifndef LCTX_CPU_KERNELS_H
#define LCTX_CPU_KERNELS_H
#include "lctx/abi.h"

namespace lctx::cpu {

/* ---- thread pool (thread_pool.cc) ---- */
int32_t num_threads();
void parallel_for(int64_t begin, int64_t end, int64_t grain, lctx_range_fn fn, void* ctx);
/* True on a thread that is inside a parallel range: parallel_for runs serially there. */
bool inside_parallel();

/* parallel_for with a lambda. */
template <class F>
void parallel(int64_t begin, int64_t end, int64_t grain, const F& fn) {
  parallel_for(begin, end, grain, [](void* ctx, int64_t b, int64_t e) { (*static_cast<const F*>(ctx))(b, e); }, const_cast<F*>(&fn));
}

/* ---- GEMM, f32 (gemm_cpu.cc) ---- */
int gemm(const lctx_gemm_params* p);
int grouped_gemm(const lctx_grouped_gemm_params* p);

/* ---- copies and casts (cast_cpu.cc) ---- */
struct StridedArg {
  void* data;
  int32_t dtype;
  int64_t strides[LCTX_MAX_DIMS]; /* elements */
};
struct CopyParams {
  StridedArg src, dst; /* any dtypes; f32 -> bf16/f16 rounds to nearest even; to integers truncates and saturates, NaN becomes 0 */
  int32_t ndim;
  int64_t shape[LCTX_MAX_DIMS];
};
void copy(const CopyParams& p);
void fill(const CopyParams& p, double value); /* dst only */

/* ---- row ops, f32 (rowops_cpu.cc); ld* = elements between rows ---- */
struct RmsNormParams { /* out = x / sqrt(mean(x^2) + eps) * weight, over `width`, for rows x groups (heads) */
  const float *x, *weight, *dout;
  float *out, *dx, *dweight; /* dweight [width] += ; may be null */
  int64_t rows, groups, width, ldx, ldout, lddout, lddx;
  float eps;
  bool accumulate; /* dx += */
};
void rms_norm(const RmsNormParams& p);
void rms_norm_backward(const RmsNormParams& p);

struct RowsParams {
  const float *a, *b;
  float* out;
  int64_t rows, width, lda, ldb, ldout;
  float alpha;
  bool accumulate;
};
void add(const RowsParams& p);      /* out = a + b */
void add_bias(const RowsParams& p); /* out += b[width] */
void sum_rows(const RowsParams& p); /* out[width] (+)= sum over rows of a */
void scale(const RowsParams& p);    /* out *= alpha */
void axpy(const RowsParams& p);     /* out += alpha * a */

struct EmbeddingParams {
  const void* table; /* [vocab, width], f32 / bf16 / f16 */
  int32_t dtype;
  const int32_t* ids; /* [n], checked by the caller */
  float* out;         /* gather: [n, width] */
  const float* dout;  /* scatter: [n, width] */
  float* dtable;      /* scatter: [vocab, width] += */
  int64_t n, vocab, width, ldtable, ldout;
};
void embedding_gather(const EmbeddingParams& p);
void embedding_scatter_add(const EmbeddingParams& p);

}  // namespace lctx::cpu
#endif
