/* Products that Hopper's kernel takes, and those whose rows are stored k innermost. */
#include "gemm_bf16_hopper.cuh"

namespace lctx::cuda {

#ifdef LCTX_HOPPER
bool gemm_has_hopper() { return is_hopper() && kHopperGemmShared <= shared_memory_limit(); }
bool gemm_hopper_takes(const GemmLaunch& p) {
  constexpr int64_t most = INT32_MAX - 256;  // coordinates of copies
  return !(p.offsets != nullptr && p.mode == 1) && p.k > 0 && p.m < most && p.n < most && p.k < most && gemm_has_hopper();
}
int launch_gemm_bf16_hopper(const GemmLaunch& p, cudaStream_t stream) {
  if (p.trans_a) return launch_gemm_bf16_hopper_transposed(p, stream);
  if (p.trans_b) return launch_gemm_hopper<0, 0>(p, stream);
  // Long k and many rows per expert: blocks in pairs, which read their rows once, keep step, and so find more of them in L2 (579 against 482 TFLOP/s).
  const bool pairs = p.offsets != nullptr && p.k >= 4096 && p.m >= static_cast<int64_t>(p.experts) * 1024;
  return pairs ? launch_gemm_hopper<1, 0, 2>(p, stream) : launch_gemm_hopper<1, 0>(p, stream);
}
#else
bool gemm_has_hopper() { return false; }
bool gemm_hopper_takes(const GemmLaunch&) { return false; }
int launch_gemm_bf16_hopper(const GemmLaunch&, cudaStream_t) { return cudaErrorNotSupported; }
#endif

}  // namespace lctx::cuda
