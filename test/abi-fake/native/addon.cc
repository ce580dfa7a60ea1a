/* What a process may meet besides this version of @lc/tensor: a core of another major, handles of other versions, externals of strangers. */
#include "lctx/napi_glue.h"

static lctx_api future_table() {
  lctx_api table{};
  table.magic = LCTX_API_MAGIC;
  table.abi_major = LCTX_ABI_MAJOR + 1;
  table.abi_minor = 7;
  table.struct_size = sizeof(lctx_api) + 64;
  table.version = "9.8.7";
  return table;
}
extern "C" __attribute__((visibility("default"))) const lctx_api* lctx_tensor_api_v1() {
  static const lctx_api table = future_table();
  return &table;
}

namespace {
const napi_type_tag kStrangerTag = {0x1234567890abcdefull, 0xfedcba0987654321ull};

struct Fake {
  lctx_tensor pub{};
  char newer_fields[64] = {};
  float values[4] = {1, 2, 3, 4};
};

/* handle({ major, minor, magic, tag: 'tensor' | 'stranger' | 'none', disposed }) -> External over 4 f32 */
Napi::Value handle(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Napi::Object options = info[0].As<Napi::Object>();
  auto* fake = new Fake();  // lives as long as the process: whoever retained it may come late
  fake->pub.magic = options.Get("magic").ToNumber().Uint32Value();
  fake->pub.abi_major = options.Get("major").ToNumber().Uint32Value();
  fake->pub.abi_minor = options.Get("minor").ToNumber().Uint32Value();
  fake->pub.struct_size = sizeof(Fake);
  fake->pub.retain = fake->pub.release = [](lctx_tensor*) {};
  fake->pub.disposed = options.Get("disposed").ToBoolean() ? 1 : 0;
  fake->pub.nbytes = sizeof fake->values;
  fake->pub.view.data = fake->values;
  fake->pub.view.device = {kDLCPU, 0};
  auto external = Napi::External<lctx_tensor>::New(env, &fake->pub);
  const std::string tag = options.Get("tag").ToString().Utf8Value();
  if (tag != "none") napi_type_tag_object(env, external, tag == "tensor" ? &lctx::kTensorTag : &kStrangerTag);
  return external;
}

/* api(real, { major, minor, size }) -> the real table as another version of it would give it: `size` bytes longer. */
Napi::Value api(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Napi::Object options = info[1].As<Napi::Object>();
  struct Longer {
    lctx_api table;
    char newer_fields[64];
  };
  auto* copy = new Longer{*info[0].As<Napi::External<lctx_api>>().Data(), {}};
  copy->table.abi_major = options.Get("major").ToNumber().Uint32Value();
  copy->table.abi_minor = options.Get("minor").ToNumber().Uint32Value();
  copy->table.struct_size = static_cast<uint32_t>(static_cast<int64_t>(sizeof(lctx_api)) + options.Get("size").ToNumber().Int64Value());
  auto external = Napi::External<lctx_api>::New(env, &copy->table);
  napi_type_tag_object(env, external, &lctx::kApiTag);
  return external;
}

Napi::Object lc_init(Napi::Env env, Napi::Object exports) {
  exports.Set("handle", Napi::Function::New(env, handle));
  exports.Set("api", Napi::Function::New(env, api));
  return exports;
}
}  // namespace
NODE_API_MODULE(abi_fake, lc_init)
