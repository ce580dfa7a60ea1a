/* N-API surface of @lc/tensor's core: the table, handles, memory counters, DLPack. Ops are in ops_addon.cc, CUDA in cuda_addon.cc. */
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "lctx/build_info.h"
#include "lctx/napi_glue.h"
#include "memory_info.h"
#include "runtime.h"

namespace lctx {
void register_ops(Napi::Env env, Napi::Object exports);
#ifdef LCTX_WITH_CUDA
void register_cuda(Napi::Env env, Napi::Object exports);
#endif

namespace {

const napi_type_tag kDlpackTag = {LCTX_DLPACK_TAG_LO, LCTX_DLPACK_TAG_HI};
const napi_type_tag kLoanTag = {0x6a09e667f3bcc909ull, 0x6c632f6c6f616e31ull};

/* JS references may only be deleted on their environment's thread. Memory borrowed from JS can lose its last owner anywhere (a DLPack
 * consumer's thread), so the reference waits here until the environment's next call. */
struct EnvState {
  std::thread::id thread = std::this_thread::get_id();
  std::mutex mutex;
  bool alive = true;
  napi_env env = nullptr;
  std::vector<napi_ref> pending;

  void drop(napi_ref ref) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!alive) return;  // the environment's teardown frees its references
    pending.push_back(ref);
  }
  void drain() {
    std::vector<napi_ref> refs;
    {
      std::lock_guard<std::mutex> lock(mutex);
      refs.swap(pending);
    }
    for (napi_ref ref : refs) napi_delete_reference(env, ref);
  }
};
using EnvHandle = std::shared_ptr<EnvState>;
void close_env(Napi::Env, EnvHandle* handle) {
  {
    std::lock_guard<std::mutex> lock((*handle)->mutex);
    (*handle)->alive = false;
  }
  delete handle;
}
EnvHandle& state(Napi::Env env) { return *env.GetInstanceData<EnvHandle>(); }

/* An External that owns `p`. A thread that is being terminated makes none any more: then `p` is given back here, or nobody ever would.
 * `Finalize` is the type of a lambda without captures. */
template <class T, class Finalize>
Napi::Value owning_external(Napi::Env env, T* p, const napi_type_tag& tag, Finalize) {
  napi_value external;
  const napi_status status = napi_create_external(
      env, p, [](napi_env, void* data, void*) { Finalize{}(static_cast<T*>(data)); }, nullptr, &external);
  if (status != napi_ok) {
    Finalize{}(p);
    throw Napi::Error::New(env);
  }
  napi_type_tag_object(env, external, &tag);
  return Napi::Value(env, external);
}

Napi::Value wrap_handle(Napi::Env env, lctx_tensor* t) {
  api()->attach_handle(t);
  return owning_external(env, t, kTensorTag, [](lctx_tensor* p) { api()->detach_handle(p); });
}

/* The struct of a handle that dispose() may be called on: adopting copies of @lc/tensor share the layout, so any ABI-1 handle will do. */
lctx_tensor* own_handle(const Napi::CallbackInfo& info) { return tensor_handle(info.Env(), info[0], "handle"); }

int wrap(void* data, uint64_t nbytes, DLDevice device, int32_t dtype, const std::vector<int64_t>& shape, const std::string& label,
         void (*free_fn)(void*), void* ctx, lctx_tensor** out) {
  const lctx_wrap_params p{sizeof p, device.device_type, device.device_id, dtype, static_cast<int32_t>(shape.size()), 0, nbytes,
                           shape.data(), label.c_str(), data, free_fn, ctx};
  return api()->wrap(&p, out);
}

std::vector<int64_t> shape_arg(Napi::Env env, Napi::Value value) {
  if (!value.IsArray()) throw_type(env, "ERR_LC_SHAPE", "shape: expected an array of sizes");
  Napi::Array array = value.As<Napi::Array>();
  if (array.Length() > LCTX_MAX_DIMS) throw_type(env, "ERR_LC_SHAPE", "shape: at most 6 dimensions");
  std::vector<int64_t> shape(array.Length());
  for (uint32_t i = 0; i < array.Length(); i++) {
    const double size = array.Get(i).IsNumber() ? array.Get(i).As<Napi::Number>().DoubleValue() : -1;
    if (!(size >= 0) || size != std::floor(size) || size > 9007199254740991.0)
      throw_type(env, "ERR_LC_SHAPE", "shape: size " + std::to_string(i) + " must be a whole number >= 0");
    shape[i] = static_cast<int64_t>(size);
  }
  return shape;
}

/* alloc(dtype, shape, deviceType, deviceId, zero, label) -> External */
Napi::Value alloc(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  state(env)->drain();
  const std::vector<int64_t> shape = shape_arg(env, info[1]);
  const std::string label = info[5].ToString().Utf8Value();
  lctx_alloc_params p{sizeof p, info[2].ToNumber().Int32Value(), info[3].ToNumber().Int32Value(), info[0].ToNumber().Int32Value(),
                      static_cast<int32_t>(shape.size()), info[4].ToBoolean() ? 1 : 0, shape.data(), label.c_str(), nullptr};
  lctx_tensor* t = nullptr;
  check(env, api()->alloc(&p, &t));
  return wrap_handle(env, t);
}

struct Borrowed {
  EnvHandle state;
  napi_ref ref;
};
void free_borrowed(void* ctx) {
  auto* b = static_cast<Borrowed*>(ctx);
  b->state->drop(b->ref);
  delete b;
}

/* fromTypedArray(typedArray, dtype, shape, label) -> External over the array's own memory. */
Napi::Value from_typed_array(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  state(env)->drain();
  if (!info[0].IsTypedArray()) throw_type(env, "ERR_LC_ARGUMENT", "fromTypedArray: expected a typed array");
  Napi::TypedArray array = info[0].As<Napi::TypedArray>();
  const std::vector<int64_t> shape = shape_arg(env, info[2]);
  void* data = nullptr;
  napi_get_typedarray_info(env, array, nullptr, nullptr, &data, nullptr, nullptr);
  napi_ref ref = nullptr;
  if (napi_create_reference(env, array.ArrayBuffer(), 1, &ref) != napi_ok) throw Napi::Error::New(env);
  const std::string label = info[3].ToString().Utf8Value();
  lctx_tensor* t = nullptr;
  check(env, wrap(data, array.ByteLength(), {kDLCPU, 0}, info[1].ToNumber().Int32Value(), shape, label, free_borrowed, new Borrowed{state(env), ref}, &t));
  return wrap_handle(env, t);
}

/* A JS release callback runs on its own thread, whoever drops the last reference. An environment that ends frees its thread-safe functions, whoever still
 * counts on them, so the call asks first whether the function is there; JavaScript that is gone cannot be told any more. */
struct PointerOwner {
  std::mutex mutex;
  bool closed = false;
  Napi::ThreadSafeFunction release;
};
using PointerHandle = std::shared_ptr<PointerOwner>;
/* A lambda: a plain function would be taken for the context in ThreadSafeFunction::New's overloads. */
constexpr auto close_pointer = [](Napi::Env, PointerHandle* handle) {
  {
    std::lock_guard<std::mutex> lock((*handle)->mutex);
    (*handle)->closed = true;
  }
  delete handle;
};
void free_pointer(void* ctx) {
  auto* handle = static_cast<PointerHandle*>(ctx);
  {
    PointerOwner& owner = **handle;
    std::lock_guard<std::mutex> lock(owner.mutex);
    if (!owner.closed && owner.release.NonBlockingCall([](Napi::Env, Napi::Function callback) { callback.Call({}); }) == napi_ok) owner.release.Release();
  }
  delete handle;
}

/* fromPointer(ptr: bigint, nbytes, deviceType, deviceId, dtype, shape, label, release?) -> External */
Napi::Value from_pointer(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!info[0].IsBigInt()) throw_type(env, "ERR_LC_ARGUMENT", "fromPointer: ptr must be a bigint");
  bool lossless = false;
  const uint64_t ptr = info[0].As<Napi::BigInt>().Uint64Value(&lossless);
  if (!lossless || ptr == 0) throw_type(env, "ERR_LC_ARGUMENT", "fromPointer: ptr must be a non-null 64-bit address");
  const std::vector<int64_t> shape = shape_arg(env, info[5]);
  const std::string label = info[6].ToString().Utf8Value();
  auto owner = std::make_shared<PointerOwner>();
  if (info[7].IsFunction()) {
    owner->release = Napi::ThreadSafeFunction::New(env, info[7].As<Napi::Function>(), "lc.release", 0, 1, close_pointer, new PointerHandle(owner));
    owner->release.Unref(env);  // a tensor that lives on must not keep the process alive
  } else {
    owner->closed = true;
  }
  lctx_tensor* t = nullptr;
  check(env, wrap(reinterpret_cast<void*>(ptr), static_cast<uint64_t>(info[1].ToNumber().Int64Value()),
                  {info[2].ToNumber().Int32Value(), info[3].ToNumber().Int32Value()}, info[4].ToNumber().Int32Value(), shape,
                  label, free_pointer, new PointerHandle(std::move(owner)), &t));
  return wrap_handle(env, t);
}

/* dispose(handle) -> whether this call disposed it */
Napi::Value dispose_handle(const Napi::CallbackInfo& info) {
  state(info.Env())->drain();
  return Napi::Boolean::New(info.Env(), dispose(own_handle(info)));
}

/* An ArrayBuffer given out over a tensor's memory. It holds a reference, because a typed array may outlive the JS tensor; dispose() gives that
 * reference back at once (Node would run the buffer's own finalizer only later). */
struct Loan {
  lctx_tensor* tensor; /* null once given back */
  bool finalized = false, external_gone = false;
  void give_back() {
    if (tensor) tensor->release(tensor);
    tensor = nullptr;
  }
  void forget() {
    if (finalized && external_gone) delete this;
  }
};

/* buffer(handle) -> { buffer: ArrayBuffer over the whole allocation, loan: External } */
Napi::Value buffer(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  lctx_tensor* t = own_handle(info);
  if (t->disposed) throw_type(env, "ERR_LC_DISPOSED", "data: the tensor was disposed");
  if (t->view.device.device_type == kDLCUDA) throw_type(env, "ERR_LC_DEVICE", "data: the tensor is on cuda; use read() or copy() it to the CPU");
  Napi::Object result = Napi::Object::New(env);
  if (t->nbytes == 0) {
    result.Set("buffer", Napi::ArrayBuffer::New(env, 0));
    return result;
  }
  t->retain(t);
  auto* loan = new Loan{t};
  napi_value array_buffer;
  const napi_status status = napi_create_external_arraybuffer(
      env, t->view.data, static_cast<size_t>(t->nbytes),
      [](napi_env, void*, void* hint) {
        auto* l = static_cast<Loan*>(hint);
        l->give_back();
        l->finalized = true;
        l->forget();
      },
      loan, &array_buffer);
  if (status != napi_ok) {
    loan->give_back();
    delete loan;
    throw make_error(env, "ERR_LC_OUT_OF_MEMORY", "data: this Node cannot make an ArrayBuffer of that size; read it in parts with rows() and read()");
  }
  result.Set("buffer", Napi::Value(env, array_buffer));
  result.Set("loan", owning_external(env, loan, kLoanTag, [](Loan* l) {
    l->external_gone = true;
    l->forget();
  }));
  return result;
}
/* detach(buffer, loan): the typed arrays over it become empty and the reference goes. */
void detach(const Napi::CallbackInfo& info) {
  if (!info[1].IsExternal()) return;
  napi_detach_arraybuffer(info.Env(), info[0]);
  info[1].As<Napi::External<Loan>>().Data()->give_back();
}

/* memory() -> { [device]: { liveBytes, peakBytes, liveTensors, allocations, byLabel } } */
Napi::Value memory(const Napi::CallbackInfo& info) {
  struct Visit { Napi::Env env; Napi::Object devices; } visit{info.Env(), Napi::Object::New(info.Env())};
  api()->visit_counters(
      [](void* ctx, const char* device, const char* label, uint64_t live, uint64_t peak, uint64_t tensors, uint64_t allocations) {
        auto* v = static_cast<Visit*>(ctx);
        Napi::Object o = Napi::Object::New(v->env);
        o.Set("liveBytes", static_cast<double>(live));
        o.Set("peakBytes", static_cast<double>(peak));
        o.Set("liveTensors", static_cast<double>(tensors));
        o.Set("allocations", static_cast<double>(allocations));
        if (label) {
          v->devices.Get(device).As<Napi::Object>().Get("byLabel").As<Napi::Object>().Set(label, o);
        } else {
          o.Set("byLabel", Napi::Object::New(v->env));
          v->devices.Set(device, o);
        }
      },
      &visit);
  return visit.devices;
}
void reset_peak(const Napi::CallbackInfo&) { api()->reset_peaks(); }

/* memInfo(deviceType, deviceId) -> { freeBytes, totalBytes, liveBytes, peakBytes } */
Napi::Value mem_info(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  lctx_mem_info m;
  check(env, api()->mem_info(info[0].ToNumber().Int32Value(), info[1].ToNumber().Int32Value(), &m));
  Napi::Object o = Napi::Object::New(env);
  o.Set("freeBytes", static_cast<double>(m.free_bytes));
  o.Set("totalBytes", static_cast<double>(m.total_bytes));
  o.Set("liveBytes", static_cast<double>(m.live_bytes));
  o.Set("peakBytes", static_cast<double>(m.peak_bytes));
  return o;
}

/* The process may have loaded an older copy of @lc/tensor first, whose table ends earlier. */
void needs_table(Napi::Env env, size_t end, const char* what) {
  if (api()->struct_size < end)
    throw_type(env, "ERR_LC_ABI", std::string(what) + ": @lc/tensor " + api()->version + ", which this process loaded first, does not have it; install one version (npm dedupe)");
}

/* setMemoryLimit(deviceType, deviceId, bytes) */
void set_memory_limit(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  needs_table(env, offsetof(lctx_api, set_memory_limit) + sizeof(void*), "setMemoryLimit");
  check(env, api()->set_memory_limit(info[0].ToNumber().Int32Value(), info[1].ToNumber().Int32Value(), static_cast<uint64_t>(info[2].ToNumber().Int64Value())));
}

/* processMemory(deviceId) -> lctx_process_memory */
Napi::Value process_memory(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  needs_table(env, offsetof(lctx_api, process_memory) + sizeof(void*), "processMemory");
  lctx_process_memory m{};
  check(env, api()->process_memory(info[0].ToNumber().Int32Value(), &m));
  Napi::Object o = Napi::Object::New(env);
  o.Set("source", m.source);
  o.Set("bytes", static_cast<double>(m.bytes));
  o.Set("peakBytes", static_cast<double>(m.peak_bytes));
  o.Set("poolBytes", static_cast<double>(m.pool_bytes));
  o.Set("poolUsedBytes", static_cast<double>(m.pool_used_bytes));
  o.Set("limitBytes", static_cast<double>(m.limit_bytes));
  return o;
}

/* ---- DLPack ---- */
struct DlpackExport {
  DLManagedTensorVersioned managed;
  lctx_tensor* owner;
  int64_t shape[LCTX_MAX_DIMS], strides[LCTX_MAX_DIMS];
};
void dlpack_deleter(DLManagedTensorVersioned* self) {
  auto* e = reinterpret_cast<DlpackExport*>(self);
  e->owner->release(e->owner);
  delete e;
}
DLDataType to_dl(int32_t dtype) {
  switch (dtype) {
    case LCTX_F32: return {kDLFloat, 32, 1};
    case LCTX_BF16: return {kDLBfloat, 16, 1};
    case LCTX_F16: return {kDLFloat, 16, 1};
    case LCTX_I32: return {kDLInt, 32, 1};
    case LCTX_I64: return {kDLInt, 64, 1};
    default: return {kDLUInt, 8, 1};
  }
}
int32_t from_dl(DLDataType t) {
  if (t.lanes != 1) return -1;
  for (int32_t d = LCTX_F32; d <= LCTX_U8; d++) {
    const DLDataType want = to_dl(d);
    if (want.code == t.code && want.bits == t.bits) return d;
  }
  return -1;
}

/* toDLPack({ x }) -> External<DLManagedTensorVersioned>, freed with the External unless a consumer took it (pointer() and consumed()). */
Napi::Value to_dlpack(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Args args(info, "toDLPack");
  const View v = args.tensor("x");
  auto* e = new DlpackExport();
  e->owner = v.owner;
  v.owner->retain(v.owner);
  std::memcpy(e->shape, v.shape, sizeof e->shape);
  std::memcpy(e->strides, v.strides, sizeof e->strides);
  e->managed = {{DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION}, nullptr, dlpack_deleter, 0,
                {v.data, v.device, v.ndim, to_dl(v.dtype), e->shape, e->strides, 0}};
  return owning_external(env, new DLManagedTensorVersioned*(&e->managed), kDlpackTag, [](DLManagedTensorVersioned** p) {
    if (*p && (*p)->deleter) (*p)->deleter(*p);
    delete p;
  });
}

DLManagedTensorVersioned** dlpack_slot(Napi::Env env, Napi::Value value) {
  bool match = false;
  if (!value.IsExternal() || napi_check_object_type_tag(env, value, &kDlpackTag, &match) != napi_ok || !match)
    throw_type(env, "ERR_LC_NOT_A_TENSOR", "fromDLPack: expected a DLPack external from toDLPack, or the address of a DLManagedTensorVersioned as a bigint");
  return value.As<Napi::External<DLManagedTensorVersioned*>>().Data();
}

/* dlpackPointer(external) -> bigint address of the DLManagedTensorVersioned for a native consumer, which then owns it: as with a Python capsule that
 * is renamed "used", the external is empty from then on. */
Napi::Value dlpack_pointer(const Napi::CallbackInfo& info) {
  DLManagedTensorVersioned** slot = dlpack_slot(info.Env(), info[0]);
  if (!*slot) throw_type(info.Env(), "ERR_LC_DISPOSED", "dlpackPointer: this DLPack external was already consumed");
  DLManagedTensorVersioned* managed = *slot;
  *slot = nullptr;
  return Napi::BigInt::New(info.Env(), static_cast<uint64_t>(reinterpret_cast<uintptr_t>(managed)));
}

void free_managed(void* ctx) {
  auto* m = static_cast<DLManagedTensorVersioned*>(ctx);
  if (m->deleter) m->deleter(m);
}

/* fromDLPack(external | bigint, label) -> { handle, dtype, shape, strides, deviceType, deviceId }; takes ownership. */
Napi::Value from_dlpack(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  DLManagedTensorVersioned* m = nullptr;
  if (info[0].IsBigInt()) {
    bool lossless = false;
    m = reinterpret_cast<DLManagedTensorVersioned*>(info[0].As<Napi::BigInt>().Uint64Value(&lossless));
  } else {
    DLManagedTensorVersioned** slot = dlpack_slot(env, info[0]);
    m = *slot;
    *slot = nullptr;
  }
  if (!m) throw_type(env, "ERR_LC_DISPOSED", "fromDLPack: this DLPack external was already consumed");
  auto refuse = [&](const char* code, const std::string& message) {
    free_managed(m);
    throw_type(env, code, message);
  };
  if (m->version.major != DLPACK_MAJOR_VERSION) refuse("ERR_LC_ABI", "fromDLPack: DLPack v" + std::to_string(m->version.major) + ", expected v1");
  const DLTensor& d = m->dl_tensor;
  const int32_t dtype = from_dl(d.dtype);
  if (dtype < 0) refuse("ERR_LC_DTYPE", "fromDLPack: dtype code " + std::to_string(d.dtype.code) + " with " + std::to_string(d.dtype.bits) + " bits is not one of f32, bf16, f16, i32, i64, u8");
  if (d.ndim < 0 || d.ndim > LCTX_MAX_DIMS) refuse("ERR_LC_SHAPE", "fromDLPack: at most 6 dimensions");
  if (d.device.device_type != kDLCPU && d.device.device_type != kDLCUDA && d.device.device_type != kDLCUDAHost)
    refuse("ERR_LC_DEVICE", "fromDLPack: device type " + std::to_string(d.device.device_type) + " is not CPU or CUDA");
  Napi::Array shape = Napi::Array::New(env), strides = Napi::Array::New(env);
  double extent = static_cast<double>(item_size(dtype)), packed = 1;
  bool empty = false;
  for (int32_t i = d.ndim - 1; i >= 0; i--) {
    const int64_t size = d.shape[i], stride = d.strides ? d.strides[i] : static_cast<int64_t>(packed);
    if (size < 0 || stride < 0) refuse("ERR_LC_STRIDES", "fromDLPack: negative sizes or strides are not supported; make a contiguous copy first");
    packed *= static_cast<double>(size);
    empty |= size == 0;
    if (size) extent += static_cast<double>(size - 1) * static_cast<double>(stride) * static_cast<double>(item_size(dtype));
    shape.Set(static_cast<uint32_t>(i), static_cast<double>(size));
    strides.Set(static_cast<uint32_t>(i), static_cast<double>(stride));
  }
  if (extent > 9007199254740992.0) refuse("ERR_LC_SHAPE", "fromDLPack: larger than 2^53 bytes");
  const std::string label = info[1].ToString().Utf8Value();
  lctx_tensor* t = nullptr;
  if (wrap(static_cast<char*>(d.data) + d.byte_offset, empty ? 0 : static_cast<uint64_t>(extent), d.device, dtype, std::vector<int64_t>(d.shape, d.shape + d.ndim), label, free_managed, m, &t))
    refuse(api()->last_error_code(), api()->last_error());
  Napi::Object o = Napi::Object::New(env);
  o.Set("handle", wrap_handle(env, t));
  o.Set("dtype", dtype);
  o.Set("shape", shape);
  o.Set("strides", strides);
  o.Set("deviceType", d.device.device_type);
  o.Set("deviceId", d.device.device_id);
  return o;
}

/* pointer(handle) -> bigint address of the allocation's first byte, for other native code. */
Napi::Value pointer(const Napi::CallbackInfo& info) {
  lctx_tensor* t = own_handle(info);
  if (t->disposed) throw_type(info.Env(), "ERR_LC_DISPOSED", "pointer: the tensor was disposed");
  return Napi::BigInt::New(info.Env(), static_cast<uint64_t>(reinterpret_cast<uintptr_t>(t->view.data)));
}

Napi::Object init_module(Napi::Env env, Napi::Object exports) {
  auto* data = new EnvHandle(std::make_shared<EnvState>());
  (*data)->env = env;
  env.SetInstanceData<EnvHandle, close_env>(data);
  const lctx_api* table = process_api();
  if (table->magic != LCTX_API_MAGIC || table->abi_major != LCTX_ABI_MAJOR)
    throw_type(env, "ERR_LC_ABI", std::string("@lc/tensor ") + own_api()->version + " (ABI v" + std::to_string(LCTX_ABI_MAJOR) +
                   ") cannot join @lc/tensor " + table->version + " (ABI v" + std::to_string(table->abi_major) +
                   "), which this process loaded first; install one version (npm dedupe, npm update '@lc/*')");
  api_slot() = table;
  auto external = Napi::External<lctx_api>::New(env, const_cast<lctx_api*>(table));
  napi_type_tag_object(env, external, &kApiTag);
  exports.Set("api", external);
  exports.Set("adopted", table != own_api());
  exports.Set("buildInfo", build_info(env));
  exports.Set("numThreads", Napi::Function::New(env, [](const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), api()->num_threads()); }));
  exports.Set("alloc", Napi::Function::New(env, alloc));
  exports.Set("dispose", Napi::Function::New(env, dispose_handle));
  exports.Set("fromTypedArray", Napi::Function::New(env, from_typed_array));
  exports.Set("fromPointer", Napi::Function::New(env, from_pointer));
  exports.Set("pointer", Napi::Function::New(env, pointer));
  exports.Set("buffer", Napi::Function::New(env, buffer));
  exports.Set("detach", Napi::Function::New(env, detach));
  exports.Set("memory", Napi::Function::New(env, memory));
  exports.Set("resetPeak", Napi::Function::New(env, reset_peak));
  exports.Set("memInfo", Napi::Function::New(env, mem_info));
  exports.Set("setMemoryLimit", Napi::Function::New(env, set_memory_limit));
  exports.Set("processMemory", Napi::Function::New(env, process_memory));
  exports.Set("toDLPack", Napi::Function::New(env, to_dlpack));
  exports.Set("dlpackPointer", Napi::Function::New(env, dlpack_pointer));
  exports.Set("fromDLPack", Napi::Function::New(env, from_dlpack));
  register_ops(env, exports);
#ifdef LCTX_WITH_CUDA
  register_cuda(env, exports);
#endif
  return exports;
}

}  // namespace
}  // namespace lctx

static Napi::Object lc_init(Napi::Env env, Napi::Object exports) { return lctx::init_module(env, exports); }
NODE_API_MODULE(lc_tensor, lc_init)
