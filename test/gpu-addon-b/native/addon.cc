#include "lctx/napi_glue.h"
#ifdef LCTX_WITH_CUDA
#include <cuda_runtime.h>

int launch_scale(float* x, int64_t n, float factor, void* stream);

namespace {
template <class T>
T handle(const lctx::Args& args, const char* key) {
  bool lossless = false;
  return reinterpret_cast<T>(args.value(key).As<Napi::Object>().Get("handle").As<Napi::BigInt>().Uint64Value(&lossless));
}
void must(const lctx::Args& args, int error) {
  if (error) args.fail("ERR_LC_CUDA", cudaGetErrorString(static_cast<cudaError_t>(error)));
}
}  // namespace
#endif

static Napi::Object lc_init(Napi::Env env, Napi::Object exports) {
  exports.Set("init", Napi::Function::New(env, lctx::init));
#ifdef LCTX_WITH_CUDA
  exports.Set("scale", Napi::Function::New(env, [](const Napi::CallbackInfo& info) {
    lctx::Args args(info, "scale");
    const lctx::View x = args.tensor("x");
    must(args, launch_scale(x.as<float>(), x.numel(), static_cast<float>(args.number("factor")), handle<void*>(args, "stream")));
  }));
  exports.Set("record", Napi::Function::New(env, [](const Napi::CallbackInfo& info) {
    lctx::Args args(info, "record");
    must(args, cudaEventRecord(handle<cudaEvent_t>(args, "event"), handle<cudaStream_t>(args, "stream")));
  }));
  exports.Set("wait", Napi::Function::New(env, [](const Napi::CallbackInfo& info) {
    lctx::Args args(info, "wait");
    must(args, cudaStreamWaitEvent(handle<cudaStream_t>(args, "stream"), handle<cudaEvent_t>(args, "event"), 0));
  }));
#endif
  return exports;
}
NODE_API_MODULE(lc_gpu_addon_b, lc_init)
