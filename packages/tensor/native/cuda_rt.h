/* CUDA devices, memory, streams: what runtime.cc and cuda_addon.cc build on. Compiled only with LCTX_WITH_CUDA; no kernel here. */
#ifndef LCTX_CUDA_RT_H
#define LCTX_CUDA_RT_H
#include <cstddef>
#include <cstdint>
#include <string>
#include "lctx/abi.h"

namespace lctx::cuda {

struct DeviceInfo {
  std::string name, uuid;
  int major, minor;
  uint64_t total_bytes, free_bytes;
  int driver, runtime; /* e.g. 13000 */
};

/* Usable devices; 0 without a driver. Never fails. */
int device_count();
/* 0, or -1 with ERR_LC_NO_DRIVER, _DRIVER_TOO_OLD, _NO_DEVICE or _NO_KERNEL_IMAGE and the fix. Creates the device's context at the first call. */
int check(int device);
int device_info(int device, DeviceInfo* out);

int alloc(int device, size_t bytes, void* stream, bool zero, void** out);
void free(int device, void* p, void* stream);
/* Pinned memory. When it cannot be pinned: *pinned false, *out null. */
int host_alloc(size_t bytes, void** out, bool* pinned);
void host_free(void* p, size_t bytes, bool pinned);
/* Free and total bytes, within the limit where there is one. What the pool holds and nobody uses is free. */
int mem_info(int device, uint64_t* free_bytes, uint64_t* total_bytes);
/* The most that this process may take of the device, everything included; 0: no limit. ERR_LC_OUT_OF_MEMORY when it takes more already. */
int set_limit(int device, uint64_t bytes);
int process_memory(int device, lctx_process_memory* out);
/* Of devices that were used. */
void reset_peaks();

/* lc's own stream of a device: created once, does not wait for the legacy default stream. */
int default_stream(int device, void** out);
int copy_async(void* dst, const void* src, size_t bytes, void* stream);

int gemm(const lctx_gemm_params* p);
/* c + bias[n]: in cuBLASLt's product where it is used and bias has c's dtype, else after it. */
int gemm_with_bias(const lctx_gemm_params* p, void* bias, int32_t bias_dtype);
int grouped_gemm(const lctx_grouped_gemm_params* p);

/* Turns a CUDA status into lc's error; 0 when it is success. Clears the sticky error. */
int status(int cuda_error, const char* what);

}  // namespace lctx::cuda
#endif
