/* Chooses a GEMM on the device: cuBLASLt where it is installed, else lc's own. LCTX_GEMM forces one. */
#ifdef LCTX_WITH_CUDA
#include <cuda_runtime.h>

#include <cstdlib>
#include <string>

#include "cuda_kernels.h"
#include "cuda_rt.h"
#include "gemm_choice.h"
#include "runtime.h"

namespace lctx::cuda {
namespace {

int stream_of(int device, void* given, void** out) {
  *out = given;
  if (given ? check(device) : default_stream(device, out)) return -1;
  return status(cudaSetDevice(device), "cudaSetDevice");
}

int launch(const GemmLaunch& g, bool a_f32, bool b_f32, void* stream) {
  return a_f32 || b_f32 ? launch_gemm_ffma(g, a_f32, b_f32, stream) : launch_gemm_bf16(g, stream);
}

int run(const GemmLaunch& g, int device, int32_t a, int32_t b, int32_t c, void* stream, const char* op) {
  const auto floating = [](int32_t t) { return t == LCTX_F32 || t == LCTX_BF16; };
  if (!floating(a) || !floating(b) || !floating(c))
    return set_error("ERR_LC_DTYPE", (std::string(op) + ": on CUDA a, b and c are f32 or bf16 (both inputs bf16 for tensor cores); cast first").c_str());
  const bool a_f32 = a == LCTX_F32, b_f32 = b == LCTX_F32;
  GemmLaunch pieces = g;
  pieces.splits = gemm_splits(g, a_f32, b_f32);
  if (pieces.splits <= 1) return status(launch(g, a_f32, b_f32, stream), op);
  void* scratch = nullptr;
  if (alloc(device, static_cast<size_t>(pieces.splits * g.m * g.n) * sizeof(float), stream, false, &scratch)) return -1;
  pieces.k_per_split = ((g.k + pieces.splits - 1) / pieces.splits + 63) / 64 * 64;
  pieces.splits = static_cast<int32_t>((g.k + pieces.k_per_split - 1) / pieces.k_per_split);
  pieces.c = scratch;
  pieces.ldc = g.n;
  pieces.c_f32 = true;
  pieces.alpha = 1;
  pieces.beta = 0;
  GemmLaunch whole = g;
  whole.splits = pieces.splits;
  int rc = launch(pieces, a_f32, b_f32, stream);
  if (!rc) rc = launch_gemm_join(whole, static_cast<const float*>(scratch), stream);
  cuda::free(device, scratch, stream);
  return status(rc, op);
}

/* What LCTX_GEMM asks for, if it can be had. */
int choose(GemmChoice* choice, const char* op) {
  *choice = gemm_choice();
  if (*choice == GemmChoice::unknown)
    return set_error("ERR_LC_ARGUMENT", (std::string(op) + ": LCTX_GEMM=" + std::getenv("LCTX_GEMM") + ": expected portable, hopper or cublaslt; leave it out for the best there is").c_str());
  if (*choice == GemmChoice::hopper && !gemm_has_hopper())
    return set_error("ERR_LC_CUDA", (std::string(op) + ": LCTX_GEMM=hopper needs a card of compute capability 9.0, its shared memory (LCTX_SMEM_LIMIT) and a build with target 90a").c_str());
  if (*choice == GemmChoice::cublaslt && !*cublaslt_path())
    return set_error("ERR_LC_CUDA", (std::string(op) + ": LCTX_GEMM=cublaslt, but libcublasLt.so.13 or .12 was not found; set LCTX_CUBLASLT to its path").c_str());
  return 0;
}

/* Whether lc's own kernels are to run, whatever there is. */
bool only_own(const lctx_gemm_params* p, GemmChoice choice) {
  return p->backend == 1 || (p->backend == 0 && (choice == GemmChoice::portable || choice == GemmChoice::hopper));
}

}  // namespace

int gemm_with_bias(const lctx_gemm_params* p, void* bias, int32_t bias_dtype) {
  void* stream;
  GemmChoice choice;
  if (stream_of(p->device_id, p->stream, &stream) || choose(&choice, "gemm")) return -1;
  if (!only_own(p, choice) && bias_dtype == p->c_dtype && reinterpret_cast<uintptr_t>(bias) % 16 == 0) {
    const int rc = cublaslt_gemm(p, bias, stream);
    if (rc <= 0) return rc;
  }
  if (gemm(p)) return -1;
  return status(launch_add_bias({{}, {bias, bias_dtype, p->n}, {p->c, p->c_dtype, p->ldc}, p->m, p->n, 1, false, nullptr}, stream), "gemm");
}

int gemm(const lctx_gemm_params* p) {
  void* stream;
  GemmChoice choice;
  if (stream_of(p->device_id, p->stream, &stream) || choose(&choice, "gemm")) return -1;
  if (!only_own(p, choice)) {
    const int rc = cublaslt_gemm(p, nullptr, stream);
    if (rc <= 0) return rc;
    if (p->backend == 2 && p->m && p->n && p->k)
      return *cublaslt_path() ? set_error("ERR_LC_CUDA", "gemm: cuBLASLt was asked for, but takes neither these dtypes nor operands that do not start on 16 bytes; use backend 0 or 1")
                              : set_error("ERR_LC_CUDA", "gemm: cuBLASLt was asked for, but libcublasLt.so.13 or .12 was not found; set LCTX_CUBLASLT to its path");
  }
  GemmLaunch g{p->a, p->b, p->c, p->m, p->n, p->k, p->lda, p->ldb, p->ldc, 0, 0, p->alpha, p->beta, p->trans_a != 0, p->trans_b != 0, p->c_dtype == LCTX_F32, nullptr, 0, 0, 1, 0, false};
  return run(g, p->device_id, p->a_dtype, p->b_dtype, p->c_dtype, stream, "gemm");
}

int grouped_gemm(const lctx_grouped_gemm_params* p) {
  void* stream;
  GemmChoice choice;
  if (stream_of(p->device_id, p->stream, &stream) || choose(&choice, "groupedGemm")) return -1;
  GemmLaunch g{p->a, p->b, p->c, p->mode == 0 ? p->rows : p->m, p->n, p->mode == 0 ? p->k : p->rows, p->lda, p->ldb, p->ldc, p->stride_b, p->stride_c, p->alpha, p->beta,
               p->mode == 1, p->mode == 0 && p->trans_b, p->c_dtype == LCTX_F32, p->offsets, p->experts, p->mode, 1, 0, false};
  return run(g, p->device_id, p->a_dtype, p->b_dtype, p->c_dtype, stream, "groupedGemm");
}

}  // namespace lctx::cuda
#endif
