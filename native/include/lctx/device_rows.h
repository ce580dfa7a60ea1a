/* A matrix on the device as kernels take it. Plain: included by .cu files and by addons alike. */
#ifndef LCTX_DEVICE_ROWS_H
#define LCTX_DEVICE_ROWS_H
#include <cstdint>

namespace lctx {
/* f32 or bf16 (lctx_dtype); kernels compute in f32. */
struct DeviceRows {
  void* data;
  int32_t dtype;
  int64_t ld; /* elements between rows */
};
}  // namespace lctx
#endif
