#ifdef LCTX_WITH_CUDA
#include "cuda_ops.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "cuda_kernels.h"
#include "cuda_rt.h"
#include "half.h"
#include "runtime.h"

namespace lctx::cuda {
namespace {

struct Rows {
  RowTensor t;
  int64_t rows, groups, width;
  int device;
};
Rows rows_arg(const Args& args, const char* key) {
  const View v = args.tensor(key);
  if (v.device.device_type != kDLCUDA) args.fail("ERR_LC_DEVICE", std::string(key) + " must be on the same cuda device as the other operands, got one on the CPU");
  if (v.dtype != LCTX_F32 && v.dtype != LCTX_BF16) args.fail("ERR_LC_DTYPE", std::string(key) + ": expected f32 or bf16, got " + v.describe());
  if (v.ndim < 1 || v.ndim > 3 || !v.rows_packed()) args.fail("ERR_LC_STRIDES", std::string(key) + ": expected rows with packed columns, got " + v.describe());
  const bool vector = v.ndim == 1;
  return {{v.data, v.dtype, vector ? v.shape[0] : v.row_stride()}, vector ? 1 : v.shape[0], v.ndim == 3 ? v.shape[1] : 1, v.shape[v.ndim - 1], v.device.device_id};
}
void same(const Args& args, const Rows& a, const Rows& b, const char* key) {
  if (a.rows != b.rows || a.groups * a.width != b.groups * b.width || a.device != b.device) args.fail("ERR_LC_SHAPE", std::string(key) + ": does not match the other operand in shape or device");
}
void vector_of(const Args& args, const Rows& v, int64_t width, const char* key) {
  if (v.rows != 1 || v.width != width) args.fail("ERR_LC_SHAPE", std::string(key) + ": expected [" + std::to_string(width) + "]");
}

/* Makes the device current and finds the stream; false when it can not. */
struct Launch {
  void* stream = nullptr;
  bool ok = false;
  Launch(const Args& args, int device) : stream(stream_arg(args)) {
    ok = check(device) == 0 && (stream || default_stream(device, &stream) == 0) && status(cudaSetDevice(device), "cudaSetDevice") == 0;
  }
};

}  // namespace

void* stream_arg(const Args& args) {
  const Napi::Value v = args.value("stream");
  if (!v.IsObject()) return nullptr;
  const Napi::Value handle = v.As<Napi::Object>().Get("handle");
  if (!handle.IsBigInt()) return nullptr;
  bool lossless = false;
  return reinterpret_cast<void*>(handle.As<Napi::BigInt>().Uint64Value(&lossless));
}

int copy(const cpu::CopyParams& p, DLDevice src, DLDevice dst, void* stream) {
  const bool from_device = src.device_type == kDLCUDA, to_device = dst.device_type == kDLCUDA;
  const int device = to_device ? dst.device_id : src.device_id;
  if (check(device) || status(cudaSetDevice(device), "cudaSetDevice")) return -1;
  if (!stream && default_stream(device, &stream)) return -1;
  int64_t n = 1;
  bool packed = p.src.dtype == p.dst.dtype;
  for (int i = p.ndim - 1; i >= 0; i--) {
    if (p.shape[i] != 1 && (p.src.strides[i] != n || p.dst.strides[i] != n)) packed = false;
    n *= p.shape[i];
  }
  if (n == 0) return 0;
  static const size_t sizes[] = {4, 2, 2, 4, 8, 1};
  if (packed) return copy_async(p.dst.data, p.src.data, static_cast<size_t>(n) * sizes[p.src.dtype], stream);
  if (from_device && to_device) {
    if (src.device_id != dst.device_id) return set_error("ERR_LC_STRIDES", "copy: between two GPUs both sides must be contiguous and of one dtype; copy on one of them first");
    return status(launch_copy(p, stream), "copy");
  }
  // Rows of one dtype: a pitched copy. Everything else needs a contiguous step on the device.
  if (p.src.dtype == p.dst.dtype && p.ndim >= 2) {
    int64_t width = 1;
    bool rows = true;
    for (int i = p.ndim - 1; i >= 1; i--) {
      if (p.shape[i] != 1 && (p.src.strides[i] != width || p.dst.strides[i] != width)) rows = false;
      width *= p.shape[i];
    }
    const size_t item = sizes[p.src.dtype];
    if (rows)
      return status(cudaMemcpy2DAsync(p.dst.data, static_cast<size_t>(p.dst.strides[0]) * item, p.src.data, static_cast<size_t>(p.src.strides[0]) * item,
                                      static_cast<size_t>(width) * item, static_cast<size_t>(p.shape[0]), cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
                    "cudaMemcpy2DAsync");
  }
  // A cast: the host's side passes through device memory of its own dtype.
  const auto host_packed = [&](const cpu::StridedArg& side) {
    int64_t width = 1;
    for (int i = p.ndim - 1; i >= 0; i--) {
      if (p.shape[i] != 1 && side.strides[i] != width) return false;
      width *= p.shape[i];
    }
    return true;
  };
  const cpu::StridedArg& host = to_device ? p.src : p.dst;
  if (!host_packed(host)) return set_error("ERR_LC_STRIDES", "copy: between CPU and cuda with a cast, the CPU side must be contiguous; copy it first");
  const size_t bytes = static_cast<size_t>(n) * sizes[host.dtype];
  void* staging = nullptr;
  if (alloc(device, bytes, stream, false, &staging)) return -1;
  cpu::CopyParams cast = p;
  (to_device ? cast.src : cast.dst).data = staging;
  int rc = 0;
  if (to_device) rc = copy_async(staging, p.src.data, bytes, stream) || status(launch_copy(cast, stream), "copy");
  else rc = status(launch_copy(cast, stream), "copy") || copy_async(p.dst.data, staging, bytes, stream);
  cuda::free(device, staging, stream);
  return rc ? -1 : 0;
}

int fill(const cpu::CopyParams& p, double value, DLDevice device, void* stream) {
  if (check(device.device_id) || status(cudaSetDevice(device.device_id), "cudaSetDevice")) return -1;
  if (!stream && default_stream(device.device_id, &stream)) return -1;
  int64_t n = 1;
  bool packed = true;
  for (int i = p.ndim - 1; i >= 0; i--) {
    packed = packed && (p.shape[i] == 1 || p.dst.strides[i] == n);
    n *= p.shape[i];
  }
  static const size_t sizes[] = {4, 2, 2, 4, 8, 1};
  if (n == 0) return 0;
  if (packed && value == 0 && !std::signbit(value))
    return status(cudaMemsetAsync(p.dst.data, 0, static_cast<size_t>(n) * sizes[p.dst.dtype], static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
  // One element goes to the device, and is copied with strides of zero.
  void* element = nullptr;
  if (alloc(device.device_id, 16, stream, false, &element)) return -1;
  alignas(8) unsigned char host[8] = {};
  cpu::CopyParams one{};
  one.ndim = 0;
  one.dst = {host, p.dst.dtype, {}};
  cpu::fill(one, value);
  cpu::CopyParams all = p;
  all.src = {element, p.dst.dtype, {}};
  // Pageable memory: cudaMemcpyAsync has read `host` when it returns.
  const int rc = copy_async(element, host, 8, stream) || status(launch_copy(all, stream), "fill");
  cuda::free(device.device_id, element, stream);
  return rc ? -1 : 0;
}

int rms_norm(const Args& args) {
  const Rows x = rows_arg(args, "x"), weight = rows_arg(args, "weight"), out = rows_arg(args, "out");
  same(args, x, out, "out");
  vector_of(args, weight, x.width, "weight");
  Launch l(args, x.device);
  if (!l.ok) return -1;
  NormLaunch p{};
  p.x = x.t;
  p.weight = weight.t;
  p.out = out.t;
  p.rows = x.rows;
  p.groups = x.groups;
  p.width = x.width;
  p.eps = static_cast<float>(args.number("eps"));
  return status(launch_rms_norm(p, l.stream), "rmsNorm");
}

int rms_norm_backward(const Args& args) {
  const Rows x = rows_arg(args, "x"), weight = rows_arg(args, "weight"), dout = rows_arg(args, "dout"), dx = rows_arg(args, "dx");
  same(args, x, dout, "dout");
  same(args, x, dx, "dx");
  vector_of(args, weight, x.width, "weight");
  const View dweight = args.optional("dWeight");
  Launch l(args, x.device);
  if (!l.ok) return -1;
  NormLaunch p{};
  p.x = x.t;
  p.weight = weight.t;
  p.dout = dout.t;
  p.dx = dx.t;
  p.rows = x.rows;
  p.groups = x.groups;
  p.width = x.width;
  p.eps = static_cast<float>(args.number("eps"));
  p.accumulate = args.flag("accumulate");
  void* partial = nullptr;
  p.partials = rms_norm_partials(p);
  if (dweight) {
    if (dweight.dtype != LCTX_F32 || dweight.numel() != x.width || dweight.device.device_type != kDLCUDA) args.fail("ERR_LC_SHAPE", "dWeight: expected f32[" + std::to_string(x.width) + "] on cuda");
    p.dweight = dweight.as<float>();
    if (alloc(x.device, static_cast<size_t>((p.partials + sum_rows_parts(p.partials)) * x.width) * sizeof(float), l.stream, false, &partial)) return -1;
    p.partial = static_cast<float*>(partial);
  }
  const int rc = status(launch_rms_norm_backward(p, l.stream), "rmsNormBackward");
  if (partial) cuda::free(x.device, partial, l.stream);
  return rc;
}

int add(const Args& args) {
  const Rows a = rows_arg(args, "a"), b = rows_arg(args, "b"), out = rows_arg(args, "out");
  same(args, out, a, "a");
  same(args, out, b, "b");
  Launch l(args, out.device);
  return l.ok ? status(launch_add({a.t, b.t, out.t, out.rows, out.width * out.groups, 1, false, nullptr}, l.stream), "add") : -1;
}
int add_bias(const Args& args) {
  const Rows x = rows_arg(args, "x"), bias = rows_arg(args, "bias");
  vector_of(args, bias, x.width * x.groups, "bias");
  Launch l(args, x.device);
  return l.ok ? status(launch_add_bias({{}, bias.t, x.t, x.rows, x.width * x.groups, 1, false, nullptr}, l.stream), "addBias") : -1;
}
int sum_rows(const Args& args) {
  const Rows x = rows_arg(args, "x"), out = rows_arg(args, "out");
  const int64_t width = x.width * x.groups;
  vector_of(args, out, width, "out");
  Launch l(args, x.device);
  if (!l.ok) return -1;
  RowsLaunch p{x.t, {}, out.t, x.rows, width, 1, args.flag("accumulate"), nullptr};
  void* partial = nullptr;
  const int64_t parts = sum_rows_parts(x.rows);
  if (parts > 1 && alloc(x.device, static_cast<size_t>(parts * width) * sizeof(float), l.stream, false, &partial)) return -1;
  p.partial = static_cast<float*>(partial);
  const int rc = status(launch_sum_rows(p, l.stream), "sumRows");
  if (partial) cuda::free(x.device, partial, l.stream);
  return rc;
}
int scale(const Args& args) {
  const Rows x = rows_arg(args, "x");
  Launch l(args, x.device);
  return l.ok ? status(launch_scale({{}, {}, x.t, x.rows, x.width * x.groups, static_cast<float>(args.number("factor")), false, nullptr}, l.stream), "scale") : -1;
}
int axpy(const Args& args) {
  const Rows x = rows_arg(args, "x"), y = rows_arg(args, "y");
  same(args, y, x, "x");
  Launch l(args, y.device);
  return l.ok ? status(launch_axpy({x.t, {}, y.t, y.rows, y.width * y.groups, static_cast<float>(args.number("alpha", 1)), false, nullptr}, l.stream), "axpy") : -1;
}

namespace {
EmbeddingLaunch embedding(const Args& args, const Rows& table, const Rows& rows) {
  const View ids = args.tensor("ids");
  if (ids.dtype != LCTX_I32 || ids.ndim != 1 || !ids.contiguous() || ids.device.device_type != kDLCUDA || ids.shape[0] != rows.rows || rows.width != table.width)
    args.fail("ERR_LC_SHAPE", "ids: expected i32[" + std::to_string(rows.rows) + "] on cuda and rows as wide as the table");
  return {table.t, rows.t, ids.as<int32_t>(), rows.rows, table.rows, table.width};
}
}  // namespace
int embedding_gather(const Args& args) {
  const Rows table = rows_arg(args, "table"), out = rows_arg(args, "out");
  const EmbeddingLaunch p = embedding(args, table, out);
  Launch l(args, out.device);
  return l.ok ? status(launch_embedding_gather(p, l.stream), "embeddingGather") : -1;
}
int embedding_scatter_add(const Args& args) {
  const Rows table = rows_arg(args, "dTable"), dout = rows_arg(args, "dout");
  if (table.t.dtype != LCTX_F32) args.fail("ERR_LC_DTYPE", "dTable: expected f32");
  const EmbeddingLaunch p = embedding(args, table, dout);
  Launch l(args, dout.device);
  void* scratch = nullptr;
  if (!l.ok || alloc(dout.device, static_cast<size_t>(embedding_scatter_scratch(p)) + 16, l.stream, false, &scratch)) return -1;
  const int rc = status(launch_embedding_scatter_add(p, scratch, l.stream), "embeddingScatterAdd");
  cuda::free(dout.device, scratch, l.stream);
  return rc;
}

}  // namespace lctx::cuda
#endif
