/* The CUDA side of addon.cc's ops: unpack and launch. */
#ifndef LC_ATTENTION_CUDA_ADDON_H
#define LC_ATTENTION_CUDA_ADDON_H
#include "lctx/napi_glue.h"

namespace attention::cuda {
void forward(const lctx::Args& args);
void backward(const lctx::Args& args);
/* Whether a pass on the current device may take Hopper's kernels: 1, 0, or -1 where there is no device to ask. */
int hopper();
void rope(const lctx::Args& args);
}  // namespace attention::cuda
#endif
