/* What an addon's CUDA dispatch needs: which device, which stream, errors. Only for code under LCTX_WITH_CUDA; no napi type leaves the addon. */
#ifndef LCTX_CUDA_GLUE_H
#define LCTX_CUDA_GLUE_H
#include <cuda_runtime.h>
#include "lctx/device_rows.h"
#include "lctx/napi_glue.h"

namespace lctx {

inline bool on_cuda(const View& v) { return v.device.device_type == kDLCUDA; }

inline void cuda_must(const Args& args, int error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  args.fail("ERR_LC_CUDA", std::string(cudaGetErrorName(static_cast<cudaError_t>(error))) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

/* Makes the tensor's device current; the stream is the options' `stream` (its `handle` is a cudaStream_t as a bigint), or lc's default one. */
inline cudaStream_t cuda_stream(const Args& args, const View& v) {
  cuda_must(args, cudaSetDevice(v.device.device_id));
  const Napi::Value given = args.value("stream");
  if (given.IsObject()) {
    const Napi::Value handle = given.As<Napi::Object>().Get("handle");
    bool lossless = false;
    if (handle.IsBigInt()) return reinterpret_cast<cudaStream_t>(handle.As<Napi::BigInt>().Uint64Value(&lossless));
  }
  void* stream = nullptr;
  check(args.env(), api()->default_stream(v.device.device_id, &stream));
  return static_cast<cudaStream_t>(stream);
}

/* A [rows, width] operand (or [width], as one row) with packed columns on the same device as `like`. */
inline DeviceRows device_rows(const Args& args, const View& v, const char* key, const View& like) {
  if (!v) return {nullptr, LCTX_F32, 0};
  if (!on_cuda(v) || v.device.device_id != like.device.device_id) args.fail("ERR_LC_DEVICE", std::string(key) + ": expected on the same GPU as the other operands");
  if (v.dtype != LCTX_F32 && v.dtype != LCTX_BF16) args.fail("ERR_LC_DTYPE", std::string(key) + ": expected f32 or bf16, got " + v.describe());
  if (!v.rows_packed()) args.fail("ERR_LC_STRIDES", std::string(key) + ": only the first dimension may be strided, got " + v.describe());
  return {v.data, v.dtype, v.ndim == 1 ? v.shape[0] : v.row_stride()};
}

}  // namespace lctx
#endif
