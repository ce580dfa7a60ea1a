/* The Hopper kernel where op(a) is a transpose: gradients of weights. */
#include "gemm_bf16_hopper.cuh"

#ifdef LCTX_HOPPER
namespace lctx::cuda {
int launch_gemm_bf16_hopper_transposed(const GemmLaunch& p, cudaStream_t stream) {
  return p.trans_b ? launch_gemm_hopper<0, 1>(p, stream) : launch_gemm_hopper<1, 1>(p, stream);
}
}  // namespace lctx::cuda
#endif
