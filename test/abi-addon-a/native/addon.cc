/* A user's addon: one op over tensors that @lc/tensor made, in its own binary. abi-addon-b compiles this file too, with other flags. */
#include "lctx/napi_glue.h"

namespace {
Napi::Value scale(const Napi::CallbackInfo& info) {
  lctx::Args args(info, "scale");
  const lctx::View x = args.cpu("x", LCTX_F32);
  const float factor = static_cast<float>(args.number("factor"));
  const int64_t width = x.row_size();
  lctx::parallel(0, x.ndim ? x.shape[0] : 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t i = 0; i < width; i++) x.as<float>()[row * x.row_stride() + i] *= factor;
  });
  return Napi::BigInt::New(info.Env(), static_cast<uint64_t>(reinterpret_cast<uintptr_t>(x.data)));
}

/* hold(tensor) keeps the memory, whatever JS does with the tensor, until letGo(), which gives back the sum of its elements. */
lctx_tensor* held = nullptr;
void hold(const Napi::CallbackInfo& info) {
  lctx::Args args(info, "hold");
  held = args.cpu("x", LCTX_F32).owner;
  held->retain(held);
}
Napi::Value let_go(const Napi::CallbackInfo& info) {
  double sum = 0;
  for (uint64_t i = 0; i < held->nbytes / sizeof(float); i++) sum += static_cast<const float*>(held->view.data)[i];
  held->release(held);
  held = nullptr;
  return Napi::Number::New(info.Env(), sum);
}

Napi::Object lc_init(Napi::Env env, Napi::Object exports) {
  exports.Set("init", Napi::Function::New(env, lctx::init));
  exports.Set("scale", Napi::Function::New(env, scale));
  exports.Set("hold", Napi::Function::New(env, hold));
  exports.Set("letGo", Napi::Function::New(env, let_go));
  return exports;
}
}  // namespace
NODE_API_MODULE(abi_addon, lc_init)
