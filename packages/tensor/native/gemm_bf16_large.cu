/* Tiles of 256 x 128: large products. */
#include "gemm_bf16.cuh"

namespace lctx::cuda {
int launch_gemm_bf16_large(const GemmLaunch& p, cudaStream_t stream) { return launch_gemm_layouts<GemmLarge, gemm_detail::Copies::kExact>(p, stream); }
}  // namespace lctx::cuda
