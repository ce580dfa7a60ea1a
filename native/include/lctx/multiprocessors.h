/* How many blocks of threads a card works on at a time. */
#ifndef LCTX_MULTIPROCESSORS_H
#define LCTX_MULTIPROCESSORS_H
#include <cuda_runtime.h>

namespace lctx::cuda {

/* Multiprocessors of the current device. Returns a cudaError_t. */
inline int multiprocessors(int* count) {
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace lctx::cuda
#endif
