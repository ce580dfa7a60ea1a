/* Tiles of 256 x 128 in steps of 64 k: large products where a block may take 146 KiB. */
#include "gemm_bf16.cuh"

namespace lctx::cuda {
int launch_gemm_bf16_deep(const GemmLaunch& p, cudaStream_t stream) { return launch_gemm_layouts<GemmDeep, gemm_detail::Copies::kExact>(p, stream); }
}  // namespace lctx::cuda
