/* N-API surface of devices, streams and events (src/cuda.ts). Handles are bigints: cudaStream_t and cudaEvent_t as other addons want them. */
#ifdef LCTX_WITH_CUDA
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "cuda_ops.h"
#include "cuda_rt.h"
#include "lctx/napi_glue.h"
#include "runtime.h"

namespace lctx {
namespace {

template <class T>
T handle(const Napi::CallbackInfo& info, size_t i) {
  if (!info[i].IsBigInt()) throw_type(info.Env(), "ERR_LC_ARGUMENT", "expected a stream or event handle");
  bool lossless = false;
  return reinterpret_cast<T>(info[i].As<Napi::BigInt>().Uint64Value(&lossless));
}
Napi::Value pointer(Napi::Env env, void* p) { return Napi::BigInt::New(env, static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p))); }
void must(Napi::Env env, cudaError_t e, const char* what) {
  if (cuda::status(e, what)) throw make_error(env, last_error_code(), last_error());
}
void use(Napi::Env env, int device) {
  if (cuda::check(device)) throw make_error(env, last_error_code(), last_error());
  must(env, cudaSetDevice(device), "cudaSetDevice");
}

Napi::Value devices(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Napi::Array list = Napi::Array::New(env);
  uint32_t n = 0;
  for (int i = 0; i < cuda::device_count(); i++) {
    cuda::DeviceInfo d;
    if (cuda::device_info(i, &d)) continue;  // unusable: requireDevice tells why
    Napi::Object o = Napi::Object::New(env);
    o.Set("device", "cuda:" + std::to_string(i));
    o.Set("name", d.name);
    o.Set("uuid", d.uuid);
    o.Set("computeCapability", std::to_string(d.major) + "." + std::to_string(d.minor));
    o.Set("totalBytes", static_cast<double>(d.total_bytes));
    o.Set("freeBytes", static_cast<double>(d.free_bytes));
    o.Set("driver", std::to_string(d.driver / 1000) + "." + std::to_string(d.driver % 1000 / 10));
    list.Set(n++, o);
  }
  return list;
}
void require_device(const Napi::CallbackInfo& info) { use(info.Env(), info[0].ToNumber().Int32Value()); }

Napi::Value default_stream(const Napi::CallbackInfo& info) {
  const int device = info[0].ToNumber().Int32Value();
  use(info.Env(), device);
  void* stream = nullptr;
  if (cuda::default_stream(device, &stream)) throw make_error(info.Env(), last_error_code(), last_error());
  return pointer(info.Env(), stream);
}
Napi::Value stream_create(const Napi::CallbackInfo& info) {
  use(info.Env(), info[0].ToNumber().Int32Value());
  cudaStream_t stream = nullptr;
  must(info.Env(), cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return pointer(info.Env(), stream);
}
void stream_destroy(const Napi::CallbackInfo& info) {
  cuda::cublaslt_forget(handle<void*>(info, 0));
  must(info.Env(), cudaStreamDestroy(handle<cudaStream_t>(info, 0)), "cudaStreamDestroy");
}
void stream_synchronize(const Napi::CallbackInfo& info) { must(info.Env(), cudaStreamSynchronize(handle<cudaStream_t>(info, 0)), "cudaStreamSynchronize"); }
void stream_wait(const Napi::CallbackInfo& info) { must(info.Env(), cudaStreamWaitEvent(handle<cudaStream_t>(info, 0), handle<cudaEvent_t>(info, 1), 0), "cudaStreamWaitEvent"); }
Napi::Value event_create(const Napi::CallbackInfo& info) {
  use(info.Env(), info[0].ToNumber().Int32Value());
  cudaEvent_t event = nullptr;
  must(info.Env(), cudaEventCreateWithFlags(&event, info[1].ToBoolean() ? cudaEventDefault : cudaEventDisableTiming), "cudaEventCreate");
  return pointer(info.Env(), event);
}
void event_destroy(const Napi::CallbackInfo& info) { must(info.Env(), cudaEventDestroy(handle<cudaEvent_t>(info, 0)), "cudaEventDestroy"); }
void event_record(const Napi::CallbackInfo& info) { must(info.Env(), cudaEventRecord(handle<cudaEvent_t>(info, 0), handle<cudaStream_t>(info, 1)), "cudaEventRecord"); }
Napi::Value event_query(const Napi::CallbackInfo& info) {
  const cudaError_t e = cudaEventQuery(handle<cudaEvent_t>(info, 0));
  if (e != cudaErrorNotReady) must(info.Env(), e, "cudaEventQuery");
  return Napi::Boolean::New(info.Env(), e == cudaSuccess);
}
Napi::Value event_elapsed(const Napi::CallbackInfo& info) {
  float ms = 0;
  must(info.Env(), cudaEventElapsedTime(&ms, handle<cudaEvent_t>(info, 0), handle<cudaEvent_t>(info, 1)), "cudaEventElapsedTime");
  return Napi::Number::New(info.Env(), ms);
}

/* Waits on a thread of libuv's pool; the promise settles on the event loop. */
class Wait : public Napi::AsyncWorker {
 public:
  Wait(Napi::Env env, int device, cudaStream_t stream, cudaEvent_t event) : AsyncWorker(env), deferred(Napi::Promise::Deferred::New(env)), device_(device), stream_(stream), event_(event) {}
  const Napi::Promise::Deferred deferred;

 protected:
  void Execute() override {
    cudaSetDevice(device_);
    error_ = event_ ? cudaEventSynchronize(event_) : cudaStreamSynchronize(stream_);
  }
  void OnOK() override {
    if (cuda::status(error_, "synchronize")) deferred.Reject(make_error(Env(), last_error_code(), last_error()).Value());
    else deferred.Resolve(Env().Undefined());
  }

 private:
  int device_;
  cudaStream_t stream_;
  cudaEvent_t event_;
  cudaError_t error_ = cudaSuccess;
};
Napi::Value stream_sync(const Napi::CallbackInfo& info) {
  auto* wait = new Wait(info.Env(), info[1].ToNumber().Int32Value(), handle<cudaStream_t>(info, 0), nullptr);
  wait->Queue();
  return wait->deferred.Promise();
}
Napi::Value event_sync(const Napi::CallbackInfo& info) {
  auto* wait = new Wait(info.Env(), info[1].ToNumber().Int32Value(), nullptr, handle<cudaEvent_t>(info, 0));
  wait->Queue();
  return wait->deferred.Promise();
}

/* isPinned({ x }) */
Napi::Value pinned(const Napi::CallbackInfo& info) {
  Args args(info, "isPinned");
  return Napi::Boolean::New(info.Env(), is_pinned(args.tensor("x").owner));
}

}  // namespace

void register_cuda(Napi::Env env, Napi::Object exports) {
  auto add = [&](const char* name, auto fn) { exports.Set(name, Napi::Function::New(env, fn, name)); };
  add("cudaDevices", devices);
  add("cudaRequireDevice", require_device);
  add("cudaDefaultStream", default_stream);
  add("cudaStreamCreate", stream_create);
  add("cudaStreamDestroy", stream_destroy);
  add("cudaStreamWait", stream_wait);
  add("cudaStreamSync", stream_sync);
  add("cudaStreamSynchronize", stream_synchronize);
  add("cudaEventCreate", event_create);
  add("cudaEventDestroy", event_destroy);
  add("cudaEventRecord", event_record);
  add("cudaEventQuery", event_query);
  add("cudaEventSync", event_sync);
  add("cudaEventElapsed", event_elapsed);
  add("cudaIsPinned", pinned);
  add("cublasLtPath", [](const Napi::CallbackInfo& info) { return Napi::String::New(info.Env(), cuda::cublaslt_path()); });
}

}  // namespace lctx
#endif
