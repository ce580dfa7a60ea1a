/* The CUDA side of addon.cc's ops: unpack and launch. */
#ifndef LC_QLORA_CUDA_ADDON_H
#define LC_QLORA_CUDA_ADDON_H
#include "lctx/napi_glue.h"

namespace lc_qlora::cuda {
void nf4_dequantize_op(const lctx::Args& args);
void mxfp4_dequantize_op(const lctx::Args& args);
void dropout_op(const lctx::Args& args);
void expert_b_op(const lctx::Args& args, bool gather);
double grad_norm_op(const lctx::Args& args);
void adamw_op(const lctx::Args& args);
}  // namespace lc_qlora::cuda
#endif
