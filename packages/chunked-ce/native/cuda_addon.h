/* The CUDA side of addon.cc's ops: unpack and launch. Indices and labels were checked by the host, which made them. */
#ifndef LCTX_CHUNKED_CE_CUDA_ADDON_H
#define LCTX_CHUNKED_CE_CUDA_ADDON_H
#include "lctx/napi_glue.h"

namespace lctx::chunked_ce::cuda {
void rows(const Args& args);
void move(const Args& args, bool gather);
}  // namespace lctx::chunked_ce::cuda
#endif
