/* What every addon.cc uses to unpack arguments: typed errors, tensors from JS, option objects. C++ exceptions stay inside one addon. */
#ifndef LCTX_NAPI_GLUE_H
#define LCTX_NAPI_GLUE_H
#include <napi.h>
#include <cmath>
#include <cstring>
#include <string>
#include "lctx/abi.h"

namespace lctx {

static const napi_type_tag kTensorTag = {LCTX_TENSOR_TAG_LO, LCTX_TENSOR_TAG_HI};
static const napi_type_tag kApiTag = {LCTX_API_TAG_LO, LCTX_API_TAG_HI};

/* The table handed over by init(); one per addon and process. */
inline const lctx_api*& api_slot() {
  static const lctx_api* api = nullptr;
  return api;
}
inline const lctx_api* api() { return api_slot(); }

template <class E = Napi::Error>
E make_error(Napi::Env env, const char* code, const std::string& message) {
  E error = E::New(env, message);
  error.Set("code", Napi::String::New(env, code));
  return error;
}
[[noreturn]] inline void throw_type(Napi::Env env, const char* code, const std::string& message) {
  throw make_error<Napi::TypeError>(env, code, message);
}
/* Turns a failed table call into a JS error with the table's code and message. */
inline void check(Napi::Env env, int rc) {
  if (rc != 0) throw make_error(env, api()->last_error_code(), api()->last_error());
}

inline size_t item_size(int32_t dtype) {
  switch (dtype) {
    case LCTX_F32: case LCTX_I32: return 4;
    case LCTX_BF16: case LCTX_F16: return 2;
    case LCTX_I64: return 8;
    default: return 1;
  }
}
inline const char* dtype_name(int32_t dtype) {
  static const char* names[] = {"f32", "bf16", "f16", "i32", "i64", "u8"};
  return dtype >= 0 && dtype <= LCTX_U8 ? names[dtype] : "?";
}

/* A borrowed, bounds-checked look at a JS Tensor; valid until the call returns. */
struct View {
  void* data = nullptr;
  int32_t dtype = LCTX_F32;
  DLDevice device{kDLCPU, 0};
  int32_t ndim = 0;
  int64_t shape[LCTX_MAX_DIMS] = {};
  int64_t strides[LCTX_MAX_DIMS] = {};  // in elements
  lctx_tensor* owner = nullptr;

  explicit operator bool() const { return owner != nullptr; }
  template <class T> T* as() const { return static_cast<T*>(data); }
  int64_t numel() const { int64_t n = 1; for (int i = 0; i < ndim; i++) n *= shape[i]; return n; }
  bool on_cpu() const { return device.device_type != kDLCUDA; }
  /* True when every dimension but the first is packed: rows of `row_size()` elements, `row_stride()` apart. */
  bool rows_packed() const {
    int64_t want = 1;
    for (int i = ndim - 1; i >= 1; i--) { if (shape[i] != 1 && strides[i] != want) return false; want *= shape[i]; }
    return true;
  }
  bool contiguous() const { return rows_packed() && (ndim == 0 || shape[0] <= 1 || strides[0] == row_size()); }
  int64_t row_size() const { int64_t n = 1; for (int i = 1; i < ndim; i++) n *= shape[i]; return n; }
  int64_t row_stride() const { return ndim ? (shape[0] <= 1 ? row_size() : strides[0]) : 1; }
  std::string describe() const {
    std::string s = std::string(dtype_name(dtype)) + "[";
    for (int i = 0; i < ndim; i++) s += (i ? "," : "") + std::to_string(shape[i]);
    return s + "]";
  }
};

/* Reads the native struct behind an external, checking tag, ABI and state. */
inline lctx_tensor* tensor_handle(Napi::Env env, Napi::Value value, const char* name) {
  if (!value.IsExternal())
    throw_type(env, "ERR_LC_NOT_A_TENSOR", std::string(name) + ": expected an @lc/tensor Tensor handle");
  bool match = false;
  if (napi_check_object_type_tag(env, value, &kTensorTag, &match) != napi_ok || !match)
    throw_type(env, "ERR_LC_NOT_A_TENSOR", std::string(name) + ": this external is not an @lc/tensor handle (type tag mismatch)");
  auto* t = value.As<Napi::External<lctx_tensor>>().Data();
  if (t->magic != LCTX_TENSOR_MAGIC || t->abi_major != LCTX_ABI_MAJOR)
    throw_type(env, "ERR_LC_ABI", std::string(name) + ": made by tensor ABI v" + std::to_string(t->abi_major) + "." +
                   std::to_string(t->abi_minor) + " but this addon was built for v" + std::to_string(LCTX_ABI_MAJOR) + "." +
                   std::to_string(LCTX_ABI_MINOR) + "; install matching @lc/* versions (npm update '@lc/*')");
  return t;
}

/* A JS Tensor is { handle: External, meta: Float64Array[byteOffset, dtype, ndim, ...shape, ...strides], label }.
 * meta comes from JS, so it is bounds-checked against the allocation before use. */
inline View tensor(Napi::Env env, Napi::Value value, const char* name) {
  if (!value.IsObject() || value.IsExternal())
    throw_type(env, "ERR_LC_NOT_A_TENSOR", std::string(name) + ": expected an @lc/tensor Tensor");
  Napi::Object object = value.As<Napi::Object>();
  Napi::Value meta_value = object.Get("meta");
  lctx_tensor* t = tensor_handle(env, object.Get("handle"), name);
  if (!meta_value.IsTypedArray() || meta_value.As<Napi::TypedArray>().TypedArrayType() != napi_float64_array)
    throw_type(env, "ERR_LC_NOT_A_TENSOR", std::string(name) + ": expected an @lc/tensor Tensor (no meta)");
  if (t->disposed)
    throw_type(env, "ERR_LC_DISPOSED", std::string(name) + ": tensor '" + object.Get("label").ToString().Utf8Value() +
                   "' was disposed; keep it alive until the last use (see Scope.move)");
  Napi::Float64Array meta = meta_value.As<Napi::Float64Array>();
  auto whole = [&](size_t i, double max) {
    double v = i < meta.ElementLength() ? meta[i] : -1;
    if (!(v >= 0) || v > max || v != std::floor(v)) throw_type(env, "ERR_LC_NOT_A_TENSOR", std::string(name) + ": corrupt tensor meta");
    return static_cast<int64_t>(v);
  };
  View view;
  view.owner = t;
  const int64_t offset = whole(0, 9e15);
  view.dtype = static_cast<int32_t>(whole(1, LCTX_U8));
  view.ndim = static_cast<int32_t>(whole(2, LCTX_MAX_DIMS));
  const int64_t item = static_cast<int64_t>(item_size(view.dtype));
  double extent = static_cast<double>(item);  // double: products of untrusted sizes must not wrap
  bool empty = false;
  for (int i = 0; i < view.ndim; i++) {
    view.shape[i] = whole(3 + i, 9e15);
    view.strides[i] = whole(3 + view.ndim + i, 9e15);
    if (view.shape[i] == 0) empty = true;
    else extent += static_cast<double>(view.shape[i] - 1) * static_cast<double>(view.strides[i]) * static_cast<double>(item);
  }
  if (!empty && static_cast<double>(offset) + extent > static_cast<double>(t->nbytes))
    throw_type(env, "ERR_LC_OUT_OF_BOUNDS", std::string(name) + ": view " + view.describe() + " at byte " + std::to_string(offset) +
                   " passes the end of its " + std::to_string(t->nbytes) + "-byte allocation");
  view.device = t->view.device;
  view.data = static_cast<char*>(t->view.data) + t->view.byte_offset + (empty ? 0 : offset);
  return view;
}

/* undefined or null -> an empty View. */
inline View optional_tensor(Napi::Env env, Napi::Value value, const char* name) {
  if (value.IsUndefined() || value.IsNull()) return View{};
  return tensor(env, value, name);
}

/* Typed access to the one options object that each op takes: `Args args(info, "attention.forward"); View q = args.tensor("q");`
 * Shapes are checked in TypeScript (src/plan.ts); this layer only guards memory safety. */
class Args {
 public:
  Args(const Napi::CallbackInfo& info, const char* op) : env_(info.Env()), op_(op) {
    if (!api()) throw make_error(env_, "ERR_LC_NOT_INITIALIZED", std::string(op) + ": the addon was not handed @lc/tensor's table (init)");
    if (info.Length() < 1 || !info[0].IsObject()) throw_type(env_, "ERR_LC_ARGUMENT", std::string(op) + ": expected an options object");
    object_ = info[0].As<Napi::Object>();
  }
  Napi::Env env() const { return env_; }
  View tensor(const char* key) const { return lctx::tensor(env_, object_.Get(key), name(key).c_str()); }
  View optional(const char* key) const { return lctx::optional_tensor(env_, object_.Get(key), name(key).c_str()); }
  /* A tensor with a required dtype on the CPU, packed rows. */
  View cpu(const char* key, int32_t dtype) const { return require(tensor(key), key, dtype); }
  View optional_cpu(const char* key, int32_t dtype) const {
    View v = optional(key);
    return v ? require(v, key, dtype) : v;
  }
  double number(const char* key) const {
    Napi::Value v = object_.Get(key);
    if (!v.IsNumber()) throw_type(env_, "ERR_LC_ARGUMENT", name(key) + ": expected a number");
    return v.As<Napi::Number>().DoubleValue();
  }
  double number(const char* key, double fallback) const {
    Napi::Value v = object_.Get(key);
    return v.IsUndefined() || v.IsNull() ? fallback : number(key);
  }
  int64_t integer(const char* key) const {
    double v = number(key);
    if (v != std::floor(v) || std::fabs(v) > 9007199254740991.0) throw_type(env_, "ERR_LC_ARGUMENT", name(key) + ": expected an integer");
    return static_cast<int64_t>(v);
  }
  int64_t integer(const char* key, int64_t fallback) const {
    Napi::Value v = object_.Get(key);
    return v.IsUndefined() || v.IsNull() ? fallback : integer(key);
  }
  bool flag(const char* key) const { return object_.Get(key).ToBoolean(); }
  std::string string(const char* key) const { return object_.Get(key).ToString().Utf8Value(); }
  Napi::Value value(const char* key) const { return object_.Get(key); }
  std::string name(const char* key) const { return std::string(op_) + ": " + key; }
  [[noreturn]] void fail(const char* code, const std::string& message) const { throw_type(env_, code, std::string(op_) + ": " + message); }
  /* Memory safety for kernels that trust sizes: `args.need(view, "k", rows * width)`. */
  void need(const View& v, const char* key, int64_t numel) const {
    if (v && v.numel() < numel) fail("ERR_LC_SHAPE", std::string(key) + " is " + v.describe() + ", needs at least " + std::to_string(numel) + " elements");
  }

 private:
  View require(View v, const char* key, int32_t dtype) const {
    if (v.dtype != dtype) throw_type(env_, "ERR_LC_DTYPE", name(key) + ": expected " + dtype_name(dtype) + ", got " + v.describe());
    if (!v.on_cpu()) throw_type(env_, "ERR_LC_DEVICE", name(key) + ": expected a CPU tensor, got one on cuda");
    if (!v.rows_packed()) throw_type(env_, "ERR_LC_STRIDES", name(key) + ": only the first dimension may be strided, got " + v.describe());
    return v;
  }
  Napi::Env env_;
  const char* op_;
  Napi::Object object_;
};

/* `init(api)`: called once per environment by @lc/tensor's loadAddon. */
inline void init(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  bool match = false;
  if (info.Length() < 1 || !info[0].IsExternal() || napi_check_object_type_tag(env, info[0], &kApiTag, &match) != napi_ok || !match)
    throw_type(env, "ERR_LC_ABI", "init: expected @lc/tensor's API table");
  auto* table = info[0].As<Napi::External<lctx_api>>().Data();
  if (table->magic != LCTX_API_MAGIC || table->abi_major != LCTX_ABI_MAJOR || table->struct_size < sizeof(lctx_api))
    throw_type(env, "ERR_LC_ABI", "@lc/tensor has ABI v" + std::to_string(table->abi_major) + "." + std::to_string(table->abi_minor) +
                   " but this addon was built for v" + std::to_string(LCTX_ABI_MAJOR) + "." + std::to_string(LCTX_ABI_MINOR) +
                   "; install matching @lc/* versions (npm update '@lc/*')");
  api_slot() = table;
}

/* parallel_for with a lambda: `parallel(0, rows, 16, [&](int64_t begin, int64_t end) { ... });` */
template <class F>
void parallel(int64_t begin, int64_t end, int64_t grain, F&& fn) {
  using Fn = std::remove_reference_t<F>;
  api()->parallel_for(begin, end, grain, [](void* ctx, int64_t b, int64_t e) { (*static_cast<Fn*>(ctx))(b, e); },
                      const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace lctx
#endif
