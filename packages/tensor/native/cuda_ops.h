/* The CUDA side of ops_addon.cc: unpacks the same options objects and launches. 0, or -1 with the error set. */
#ifndef LCTX_CUDA_OPS_H
#define LCTX_CUDA_OPS_H
#include "cpu_kernels.h"
#include "lctx/napi_glue.h"

namespace lctx::cuda {

int copy(const cpu::CopyParams& p, DLDevice src, DLDevice dst, void* stream);
int fill(const cpu::CopyParams& p, double value, DLDevice device, void* stream);
int rms_norm(const Args& args);
int rms_norm_backward(const Args& args);
int add(const Args& args);
int add_bias(const Args& args);
int sum_rows(const Args& args);
int scale(const Args& args);
int axpy(const Args& args);
int embedding_gather(const Args& args);
int embedding_scatter_add(const Args& args);

/* `stream` of an options object: a Stream of cuda.ts (its `handle` is the cudaStream_t as a bigint), or null for the default one. */
void* stream_arg(const Args& args);

}  // namespace lctx::cuda
#endif
