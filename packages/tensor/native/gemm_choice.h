/* Which bf16 GEMM runs. LCTX_GEMM forces one, for tests and benches; it is read at every product, so that a process can change it. */
#ifndef LCTX_GEMM_CHOICE_H
#define LCTX_GEMM_CHOICE_H
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace lctx::cuda {

/* portable: mma.sync. hopper: lc's own on Hopper cards. cublaslt: plain products by cuBLASLt, which must be there. best: cuBLASLt if it is there, then hopper, then portable. */
enum class GemmChoice { best, portable, hopper, cublaslt, unknown };
GemmChoice gemm_choice();

/* Whether this build and the current device have the Hopper kernel. */
bool gemm_has_hopper();
/* Whether they have, and it can do this product (rows of operands start on 16 bytes: the caller looks). */
bool gemm_hopper_takes(const GemmLaunch& p);
int launch_gemm_bf16_hopper(const GemmLaunch& p, cudaStream_t stream);

}  // namespace lctx::cuda
#endif
