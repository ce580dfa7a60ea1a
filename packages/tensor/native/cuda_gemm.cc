/* Chooses a GEMM on the device: cuBLASLt where it is installed, else lc's own. */
#ifdef LCTX_WITH_CUDA
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "cuda_rt.h"
#include "runtime.h"

namespace lctx::cuda {
namespace {

int stream_of(int device, void* given, void** out) {
  *out = given;
  return given ? check(device) : default_stream(device, out);
}

int run(const GemmLaunch& g, int32_t a, int32_t b, int32_t c, void* stream, const char* op) {
  if (a == LCTX_BF16 && b == LCTX_BF16 && (c == LCTX_BF16 || c == LCTX_F32)) return status(launch_gemm_bf16(g, stream), op);
  const auto floating = [](int32_t t) { return t == LCTX_F32 || t == LCTX_BF16; };
  if (floating(a) && floating(b) && floating(c)) return status(launch_gemm_ffma(g, a == LCTX_F32, b == LCTX_F32, stream), op);
  return set_error("ERR_LC_DTYPE", (std::string(op) + ": on CUDA a, b and c are f32 or bf16 (both inputs bf16 for tensor cores); cast first").c_str());
}

}  // namespace

int gemm(const lctx_gemm_params* p) {
  void* stream;
  if (stream_of(p->device_id, p->stream, &stream)) return -1;
  if (p->backend != 1) {
    const int rc = cublaslt_gemm(p, stream);
    if (rc <= 0) return rc;
    if (p->backend == 2) return set_error("ERR_LC_CUDA", "gemm: cuBLASLt was asked for, but libcublasLt.so.13 or .12 was not found; set LCTX_CUBLASLT to its path");
  }
  GemmLaunch g{p->a, p->b, p->c, p->m, p->n, p->k, p->lda, p->ldb, p->ldc, 0, 0, p->alpha, p->beta, p->trans_a != 0, p->trans_b != 0, p->c_dtype == LCTX_F32, nullptr, 0, 0};
  return run(g, p->a_dtype, p->b_dtype, p->c_dtype, stream, "gemm");
}

int grouped_gemm(const lctx_grouped_gemm_params* p) {
  void* stream;
  if (stream_of(p->device_id, p->stream, &stream)) return -1;
  GemmLaunch g{p->a, p->b, p->c, p->mode == 0 ? p->rows : p->m, p->n, p->mode == 0 ? p->k : p->rows, p->lda, p->ldb, p->ldc, p->stride_b, p->stride_c, p->alpha, p->beta,
               p->mode == 1, p->mode == 0 && p->trans_b, p->c_dtype == LCTX_F32, p->offsets, p->experts, p->mode};
  return run(g, p->a_dtype, p->b_dtype, p->c_dtype, stream, "groupedGemm");
}

}  // namespace lctx::cuda
#endif
