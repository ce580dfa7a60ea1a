/* Launchers of @lc/tensor's CUDA kernels: plain structs, streams as void*, CUDA statuses as int (0 = launched). */
#ifndef LCTX_CUDA_KERNELS_H
#define LCTX_CUDA_KERNELS_H
#include "cpu_kernels.h"
#include "lctx/abi.h"

namespace lctx::cuda {

/* Whether this build has code for the current device. */
int probe_kernel_image();

/* Strided copy with cast, on one device. `src_stride0`: every element of src is its first (fill). */
int launch_copy(const cpu::CopyParams& p, void* stream);

/* Rows of f32 or bf16; arithmetic in f32. A tensor's dtype is LCTX_F32 or LCTX_BF16. */
struct RowTensor {
  void* data;
  int32_t dtype;
  int64_t ld;
};
struct NormLaunch {
  RowTensor x, weight, dout, out, dx;
  float* dweight; /* f32 [width] += ; needs `partial`: f32 [partials + sum_rows_parts(partials), width] */
  float* partial;
  int64_t rows, groups, width, partials;
  float eps;
  bool accumulate;
};
int launch_rms_norm(const NormLaunch& p, void* stream);
int launch_rms_norm_backward(const NormLaunch& p, void* stream);
int64_t rms_norm_partials(const NormLaunch& p); /* what `partials` must be, with or without dweight */

struct RowsLaunch {
  RowTensor a, b, out; /* b: a row for add_bias */
  int64_t rows, width;
  float alpha;
  bool accumulate;
  float* partial; /* sum_rows: f32 [sum_rows_parts(rows), width] when that is more than 1 */
};
int64_t sum_rows_parts(int64_t rows);
int launch_add(const RowsLaunch& p, void* stream);      /* out = a + b */
int launch_add_bias(const RowsLaunch& p, void* stream); /* out += b[width] */
int launch_sum_rows(const RowsLaunch& p, void* stream); /* out[width] (+)= sum of rows of a */
int launch_scale(const RowsLaunch& p, void* stream);    /* out *= alpha */
int launch_axpy(const RowsLaunch& p, void* stream);     /* out += alpha a */

struct EmbeddingLaunch {
  RowTensor table, rows; /* scatter: table is f32 and added to */
  const int32_t* ids;
  int64_t n, vocab, width;
};
int launch_embedding_gather(const EmbeddingLaunch& p, void* stream); /* ids outside the table give NaN rows: the host cannot look */
int64_t embedding_scatter_scratch(const EmbeddingLaunch& p); /* bytes of device memory that it needs */
int launch_embedding_scatter_add(const EmbeddingLaunch& p, void* scratch, void* stream);

/* One GEMM or a group of them; see lctx_gemm_params and lctx_grouped_gemm_params. */
struct GemmLaunch {
  const void *a, *b;
  void* c;
  int64_t m, n, k, lda, ldb, ldc, stride_b, stride_c;
  float alpha, beta;
  bool trans_a, trans_b, c_f32;
  const int32_t* offsets; /* null: a single GEMM */
  int32_t experts, mode;  /* mode 0: rows of expert e are offsets[e].. of a and c; mode 1: they are the k of c_e */
  int32_t splits;         /* > 1: pieces of k, whose products c holds one after another, f32 [splits, m, n]; then launch_gemm_join */
  int64_t k_per_split;
  bool vector_c;          /* set by the launcher: c's rows are aligned for vector stores */
};
/* Pieces that the k of a product with few tiles and a long k (a weight gradient over all tokens) is cut into, so that it fills the card; else 1. */
int32_t gemm_splits(const GemmLaunch& p, bool a_f32, bool b_f32);
int launch_gemm_join(const GemmLaunch& p, const float* pieces, void* stream); /* c = alpha sum of pieces + beta c, in order */
int launch_gemm_bf16(GemmLaunch p, void* stream);        /* mma.sync, sm_80 and up, 98 KiB of shared memory suffice */
/* Full f32, operands f32 or bf16 in any mixture: by tensor cores where one side is narrow, else by FFMA. */
int launch_gemm_ffma(const GemmLaunch& p, bool a_f32, bool b_f32, void* stream);
/* False: it is not narrow, and nothing was launched. */
bool launch_gemm_narrow(const GemmLaunch& p, bool a_f32, bool b_f32, void* stream, int* status);
int32_t gemm_narrow_splits(const GemmLaunch& p, bool a_f32, bool b_f32); /* 0: not one of them */

/* cuBLASLt, if this machine has it: 0 done, 1 not available (the caller takes its own kernel), -1 error set. `bias`: null, or [n] in c's dtype. */
int cublaslt_gemm(const lctx_gemm_params* p, const void* bias, void* stream);
const char* cublaslt_path();         /* "" when not found */
void cublaslt_forget(void* stream); /* frees what it keeps for a stream that is about to be destroyed */

}  // namespace lctx::cuda
#endif
