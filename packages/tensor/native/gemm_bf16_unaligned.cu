/* Operands with partial chunks of 8 elements, and those whose rows do not start on 16 bytes. */
#include "gemm_bf16.cuh"

namespace lctx::cuda {
int launch_gemm_bf16_chunks(const GemmLaunch& p, cudaStream_t stream) { return launch_gemm_layouts<GemmSmall, gemm_detail::Copies::kChunks>(p, stream); }
int launch_gemm_bf16_elements(const GemmLaunch& p, cudaStream_t stream) { return launch_gemm_layouts<GemmSmall, gemm_detail::Copies::kElements>(p, stream); }
}  // namespace lctx::cuda
