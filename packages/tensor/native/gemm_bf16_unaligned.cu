/* Operands whose rows do not start on 16 bytes: element by element instead of cp.async. */
#include "gemm_bf16.cuh"

namespace lctx::cuda {
int launch_gemm_bf16_unaligned(const GemmLaunch& p, cudaStream_t stream) { return launch_gemm_layouts<GemmSmall, false>(p, stream); }
}  // namespace lctx::cuda
