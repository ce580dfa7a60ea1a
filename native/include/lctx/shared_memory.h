/* How much shared memory a block may take; more than 48 KiB must be asked for, once per kernel and device. */
#ifndef LCTX_SHARED_MEMORY_H
#define LCTX_SHARED_MEMORY_H
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>

namespace lctx::cuda {

/* Bytes that a block may take on the current device; 0 where it cannot be asked. LCTX_SMEM_LIMIT (99KiB, or bytes) lowers it: a card with less, tried on one
 * with more. What has a larger and a smaller configuration chooses by this. */
inline int64_t shared_memory_limit() {
  static const int64_t wish = [] {
    const char* text = std::getenv("LCTX_SMEM_LIMIT");
    if (!text || !*text) return INT64_MAX;
    char* end = nullptr;
    const double value = std::strtod(text, &end);
    return static_cast<int64_t>(std::strncmp(end, "KiB", 3) == 0 ? value * 1024 : value);
  }();
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return std::min<int64_t>(bytes, wish);
}

/* Lets `kernel` use `bytes` on the current device. Returns a cudaError_t: beyond `shared_memory_limit` too, so that no kernel passes the tests of a smaller
 * card by taking what that card has not. */
inline int allow_shared_memory(const void* kernel, int bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  static std::mutex mutex;
  static auto* done = new std::set<std::pair<const void*, int>>();
  std::lock_guard<std::mutex> lock(mutex);
  if (done->count({kernel, device})) return cudaSuccess;
  if (bytes > shared_memory_limit()) return cudaErrorInvalidValue;
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e == cudaSuccess) done->insert({kernel, device});
  return e;
}

}  // namespace lctx::cuda
#endif
