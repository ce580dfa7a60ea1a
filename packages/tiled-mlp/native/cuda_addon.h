/* The CUDA side of addon.cc's ops: unpack and launch. */
#ifndef LCTX_TILED_MLP_CUDA_ADDON_H
#define LCTX_TILED_MLP_CUDA_ADDON_H
#include "lctx/napi_glue.h"

namespace lctx::mlp::cuda {
void glu_op(const Args& args);
void glu_backward_op(const Args& args);
void route_op(const Args& args);
void route_backward_op(const Args& args);
void gather_op(const Args& args);
void combine_op(const Args& args);
}  // namespace lctx::mlp::cuda
#endif
