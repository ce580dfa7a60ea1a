/* More than 48 KiB of shared memory must be asked for, once per kernel and device. */
#ifndef LCTX_SHARED_MEMORY_H
#define LCTX_SHARED_MEMORY_H
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

namespace lctx::cuda {

/* Lets `kernel` use `bytes` on the current device. Returns a cudaError_t. */
inline int allow_shared_memory(const void* kernel, int bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  static std::mutex mutex;
  static auto* done = new std::set<std::pair<const void*, int>>();
  std::lock_guard<std::mutex> lock(mutex);
  if (done->count({kernel, device})) return cudaSuccess;
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e == cudaSuccess) done->insert({kernel, device});
  return e;
}

}  // namespace lctx::cuda
#endif
