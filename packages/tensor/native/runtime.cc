#include "runtime.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "cpu_kernels.h"
#ifdef LCTX_WITH_CUDA
#include "cuda_rt.h"
#endif
#include "memory_info.h"

namespace lctx {
namespace {

thread_local std::string t_error_code = "ERR_LC_ARGUMENT";
thread_local std::string t_error;

/* One allocation: the public struct first, so that a lctx_tensor* is an Allocation*.
 * Two counts. data_refs: who may still touch the memory; at zero it is freed. struct_refs: who may still read this struct; the data
 * references count as one, each JS External as one. A disposed handle therefore stays readable until JS forgets it. */
struct Allocation {
  lctx_tensor pub;
  std::atomic<int64_t> data_refs{1};
  std::atomic<int64_t> struct_refs{1};
  int64_t shape[LCTX_MAX_DIMS] = {};
  int64_t strides[LCTX_MAX_DIMS] = {};
  std::string label;
  void* base = nullptr;       // what to free
  void* stream = nullptr;
  bool counted = false;
  bool pinned = false;
  void (*free_fn)(void*) = nullptr;  // borrowed memory
  void* free_ctx = nullptr;
};
Allocation* of(lctx_tensor* t) { return reinterpret_cast<Allocation*>(t); }

struct Counters {
  uint64_t live_bytes = 0, peak_bytes = 0, live_tensors = 0, allocations = 0;
};
struct DeviceCounters {
  Counters total;
  std::map<std::string, Counters> by_label;
};
std::mutex g_mutex;
std::map<std::string, DeviceCounters>& counters() {
  static auto* all = new std::map<std::string, DeviceCounters>();  // never destroyed: frees may come during process exit
  return *all;
}

std::string device_name(DLDevice device) {
  if (device.device_type == kDLCUDA) return "cuda:" + std::to_string(device.device_id);
  return device.device_type == kDLCUDAHost ? "host" : "cpu";
}

void count(Allocation* a, int sign) {
  const uint64_t bytes = a->pub.nbytes;
  std::lock_guard<std::mutex> lock(g_mutex);
  DeviceCounters& device = counters()[device_name(a->pub.view.device)];
  for (Counters* c : {&device.total, &device.by_label[a->label]}) {
    if (sign > 0) {
      c->live_bytes += bytes;
      c->live_tensors++;
      c->allocations++;
      if (c->live_bytes > c->peak_bytes) c->peak_bytes = c->live_bytes;
    } else {
      c->live_bytes -= bytes;
      c->live_tensors--;
    }
  }
}

std::atomic<uint64_t> g_host_limit{0};

/* What the limit of CPU and host memory leaves; UINT64_MAX without one. */
uint64_t left_of_host_limit() {
  const uint64_t limit = g_host_limit.load();
  if (!limit) return UINT64_MAX;
  std::lock_guard<std::mutex> lock(g_mutex);
  uint64_t live = 0;
  for (const char* name : {"cpu", "host"}) live += counters()[name].total.live_bytes;
  return limit > live ? limit - live : 0;
}

constexpr uint64_t kAlign = 256;            // GEMM packing and cache lines
constexpr uint64_t kHugePage = 2u << 20;    // large buffers: fewer page faults and TLB misses
constexpr uint64_t kCheckFree = 256u << 20; // from here on ask the machine first: Linux overcommits, then kills

void free_struct_ref(Allocation* a) {
  if (a->struct_refs.fetch_sub(1, std::memory_order_acq_rel) == 1) delete a;
}

void free_data(Allocation* a) {
  if (a->free_fn) {
    a->free_fn(a->free_ctx);
  } else if (a->base) {
    switch (a->pub.view.device.device_type) {
#ifdef LCTX_WITH_CUDA
      case kDLCUDA: cuda::free(a->pub.view.device.device_id, a->base, a->stream); break;
      case kDLCUDAHost:
        if (a->pinned) cuda::host_free(a->base, a->pub.nbytes, a->pinned);
        else std::free(a->base);
        break;
#endif
      default: std::free(a->base);
    }
  }
  a->base = nullptr;
  if (a->counted) count(a, -1);
}

void retain_impl(lctx_tensor* t) { of(t)->data_refs.fetch_add(1, std::memory_order_relaxed); }
void release_impl(lctx_tensor* t) {
  Allocation* a = of(t);
  if (a->data_refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  free_data(a);
  free_struct_ref(a);
}

DLDataType dl_dtype(int32_t dtype) {
  switch (dtype) {
    case LCTX_F32: return {kDLFloat, 32, 1};
    case LCTX_BF16: return {kDLBfloat, 16, 1};
    case LCTX_F16: return {kDLFloat, 16, 1};
    case LCTX_I32: return {kDLInt, 32, 1};
    case LCTX_I64: return {kDLInt, 64, 1};
    default: return {kDLUInt, 8, 1};
  }
}
uint64_t item_size(int32_t dtype) {
  static const uint64_t sizes[] = {4, 2, 2, 4, 8, 1};
  return sizes[dtype];
}

Allocation* make(DLDevice device, int32_t dtype, int32_t ndim, const int64_t* shape, const char* label) {
  auto* a = new (std::nothrow) Allocation();
  if (!a) return nullptr;
  a->label = label ? label : "unlabelled";
  lctx_tensor& t = a->pub;
  t = {LCTX_TENSOR_MAGIC, LCTX_ABI_MAJOR, LCTX_ABI_MINOR, sizeof(lctx_tensor), retain_impl, release_impl, 0, 0, 0, nullptr, {}};
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; i--) {
    a->shape[i] = shape[i];
    a->strides[i] = stride;
    stride *= shape[i];
  }
  t.view = {nullptr, device, ndim, dl_dtype(dtype), a->shape, a->strides, 0};
  return a;
}

/* Bytes of a shape, or false when it is negative, too large, or has too many dimensions. */
bool shape_bytes(int32_t dtype, int32_t ndim, const int64_t* shape, uint64_t* out) {
  if (dtype < LCTX_F32 || dtype > LCTX_U8 || ndim < 0 || ndim > LCTX_MAX_DIMS) return false;
  double check = static_cast<double>(item_size(dtype));
  uint64_t bytes = item_size(dtype);
  for (int i = 0; i < ndim; i++) {
    if (shape[i] < 0) return false;
    check *= static_cast<double>(shape[i]);
    bytes *= static_cast<uint64_t>(shape[i]);
  }
  if (check > 9007199254740992.0) return false;  // 2^53: also JavaScript's limit
  *out = bytes;
  return true;
}

std::string gib(uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1u << 30));
  return text;
}

int out_of_memory(const char* label, uint64_t bytes, const std::string& where, uint64_t free_bytes) {
  const std::string message = "allocating " + gib(bytes) + " for '" + (label ? label : "unlabelled") + "' failed on " + where + ": " +
                              gib(free_bytes) + " free; use a shorter sequence or smaller chunks, or free memory (memory() lists what lc holds)";
  return set_error("ERR_LC_OUT_OF_MEMORY", message.c_str());
}

void* host_memory(uint64_t bytes, bool zero) {
  const uint64_t align = bytes >= kHugePage * 2 ? kHugePage : kAlign;
  void* p = std::aligned_alloc(align, (bytes + align - 1) / align * align);
  if (!p) return nullptr;
  if (align == kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
  if (zero) {
    struct Job { char* p; } job{static_cast<char*>(p)};
    cpu::parallel_for(0, static_cast<int64_t>(bytes), 4 << 20,
                      [](void* ctx, int64_t b, int64_t e) { std::memset(static_cast<Job*>(ctx)->p + b, 0, static_cast<size_t>(e - b)); }, &job);
  }
  return p;
}

int alloc_impl(const lctx_alloc_params* p, lctx_tensor** out) {
  uint64_t bytes = 0;
  if (!shape_bytes(p->dtype, p->ndim, p->shape, &bytes))
    return set_error("ERR_LC_SHAPE", "alloc: sizes must be whole, non-negative, at most 6 of them, and their bytes below 2^53");
  const DLDevice device{p->device_type, p->device_id};
  const uint64_t padded = bytes ? bytes : 1;
  if (device.device_type == kDLCUDA) {
#ifdef LCTX_WITH_CUDA
    if (cuda::check(device.device_id)) return -1;
#else
    return set_error("ERR_LC_NO_PREBUILD", "this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use device 'cpu'");
#endif
  } else {
    const uint64_t left = left_of_host_limit();
    if (padded > left) return out_of_memory(p->label, padded, "host RAM, whose limit is " + gib(g_host_limit.load()) + " (ramLimit)", left);
    if (padded >= kCheckFree) {
      const uint64_t available = host_memory_info().available;
      if (padded > available) return out_of_memory(p->label, padded, "host RAM", available);
    }
  }
  Allocation* a = make(device, p->dtype, p->ndim, p->shape, p->label);
  if (!a) return set_error("ERR_LC_OUT_OF_MEMORY", "alloc: no memory for a handle");
  a->pub.nbytes = bytes;
  int rc = 0;
  switch (device.device_type) {
    case kDLCPU: a->base = host_memory(padded, p->zero); break;
    case kDLCUDAHost:
#ifdef LCTX_WITH_CUDA
      if (cuda::device_count() > 0) {
        rc = cuda::host_alloc(padded, &a->base, &a->pinned);
        if (!rc && a->pinned && p->zero) std::memset(a->base, 0, padded);
        if (!rc && !a->pinned) a->base = host_memory(padded, p->zero);
        break;
      }
#endif
      a->base = host_memory(padded, p->zero);
      break;
#ifdef LCTX_WITH_CUDA
    case kDLCUDA:
      a->stream = p->stream;
      if (!a->stream) rc = cuda::default_stream(device.device_id, &a->stream);
      if (!rc) rc = cuda::alloc(device.device_id, padded, a->stream, p->zero != 0, &a->base);
      break;
#endif
    default: rc = set_error("ERR_LC_DEVICE", "alloc: unknown device type");
  }
  if (rc || !a->base) {
    delete a;
    return rc ? rc : out_of_memory(p->label, padded, device_name(device), host_memory_info().available);
  }
  a->pub.view.data = a->base;
  a->counted = true;
  count(a, +1);
  *out = &a->pub;
  return 0;
}

int mem_info_impl(int32_t device_type, int32_t device_id, lctx_mem_info* out) {
  *out = {sizeof(lctx_mem_info), 0, 0, 0, 0, 0};
  if (device_type == kDLCUDA) {
#ifdef LCTX_WITH_CUDA
    if (cuda::check(device_id) || cuda::mem_info(device_id, &out->free_bytes, &out->total_bytes)) return -1;
#else
    return set_error("ERR_LC_NO_PREBUILD", "this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use device 'cpu'");
#endif
  } else {
    const HostMemory host = host_memory_info();
    out->free_bytes = std::min(host.available, left_of_host_limit());
    out->total_bytes = g_host_limit.load() ? std::min(host.total, g_host_limit.load()) : host.total;
  }
  std::lock_guard<std::mutex> lock(g_mutex);
  auto found = counters().find(device_name({device_type, device_id}));
  if (found != counters().end()) {
    out->live_bytes = found->second.total.live_bytes;
    out->peak_bytes = found->second.total.peak_bytes;
  }
  return 0;
}

int gemm_impl(const lctx_gemm_params* p) {
  if (p->device_type != kDLCUDA) return cpu::gemm(p);
#ifdef LCTX_WITH_CUDA
  return cuda::gemm(p);
#else
  return set_error("ERR_LC_NO_PREBUILD", "gemm: this build of @lc/tensor has no CUDA code");
#endif
}
int grouped_gemm_impl(const lctx_grouped_gemm_params* p) {
  if (p->device_type != kDLCUDA) return cpu::grouped_gemm(p);
#ifdef LCTX_WITH_CUDA
  return cuda::grouped_gemm(p);
#else
  return set_error("ERR_LC_NO_PREBUILD", "groupedGemm: this build of @lc/tensor has no CUDA code");
#endif
}
int default_stream_impl(int32_t device_id, void** stream) {
#ifdef LCTX_WITH_CUDA
  return cuda::check(device_id) ? -1 : cuda::default_stream(device_id, stream);
#else
  (void)device_id;
  (void)stream;
  return set_error("ERR_LC_NO_PREBUILD", "this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use device 'cpu'");
#endif
}

int wrap_impl(const lctx_wrap_params* p, lctx_tensor** out) {
  uint64_t bytes = 0;
  if (!shape_bytes(p->dtype, p->ndim, p->shape, &bytes)) return set_error("ERR_LC_SHAPE", "wrap: bad shape or dtype");
  Allocation* a = make({p->device_type, p->device_id}, p->dtype, p->ndim, p->shape, p->label);
  if (!a) return set_error("ERR_LC_OUT_OF_MEMORY", "wrap: no memory for a handle");
  a->pub.nbytes = p->nbytes;
  a->pub.view.data = p->data;
  a->free_fn = p->free_fn;
  a->free_ctx = p->ctx;
  *out = &a->pub;
  return 0;
}
void attach_impl(lctx_tensor* t) { of(t)->struct_refs.fetch_add(1, std::memory_order_relaxed); }
void detach_impl(lctx_tensor* t) {
  dispose(t);
  free_struct_ref(of(t));
}
void visit_counters_impl(lctx_counter_fn fn, void* ctx) {
  std::map<std::string, DeviceCounters> snapshot;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    snapshot = counters();
  }
  auto visit = [&](const std::string& device, const char* label, const Counters& c) {
    fn(ctx, device.c_str(), label, c.live_bytes, c.peak_bytes, c.live_tensors, c.allocations);
  };
  for (const auto& [device, d] : snapshot) {
    visit(device, nullptr, d.total);
    for (const auto& [label, c] : d.by_label) visit(device, label.c_str(), c);
  }
}
void reset_peaks_impl() {
#ifdef LCTX_WITH_CUDA
  cuda::reset_peaks();
#endif
  std::lock_guard<std::mutex> lock(g_mutex);
  for (auto& [name, device] : counters()) {
    device.total.peak_bytes = device.total.live_bytes;
    for (auto& [label, c] : device.by_label) c.peak_bytes = c.live_bytes;
  }
}

int set_memory_limit_impl(int32_t device_type, int32_t device_id, uint64_t bytes) {
  if (device_type != kDLCUDA) {
    g_host_limit = bytes;
    return 0;
  }
#ifdef LCTX_WITH_CUDA
  return cuda::set_limit(device_id, bytes);
#else
  (void)device_id;
  return set_error("ERR_LC_NO_PREBUILD", "this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use device 'cpu'");
#endif
}
int process_memory_impl(int32_t device_id, lctx_process_memory* out) {
#ifdef LCTX_WITH_CUDA
  return cuda::process_memory(device_id, out);
#else
  (void)device_id;
  (void)out;
  return set_error("ERR_LC_NO_PREBUILD", "this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use device 'cpu'");
#endif
}

#ifndef LCTX_VERSION
#define LCTX_VERSION "0.1.0"
#endif
const lctx_api kApi = {LCTX_API_MAGIC, LCTX_ABI_MAJOR, LCTX_ABI_MINOR, sizeof(lctx_api), LCTX_VERSION,
                       last_error_code, last_error, set_error, cpu::num_threads, cpu::parallel_for,
                       alloc_impl, mem_info_impl, gemm_impl, grouped_gemm_impl, default_stream_impl,
                       wrap_impl, attach_impl, detach_impl, visit_counters_impl, reset_peaks_impl,
                       set_memory_limit_impl, process_memory_impl};

}  // namespace

int set_error(const char* code, const char* message) {
  t_error_code = code;
  t_error = message;
  return -1;
}
const char* last_error_code() { return t_error_code.c_str(); }
const char* last_error() { return t_error.c_str(); }

bool dispose(lctx_tensor* t) {
  if (__atomic_exchange_n(&t->disposed, 1, __ATOMIC_ACQ_REL)) return false;
  t->release(t);
  return true;
}
void* stream_of(const lctx_tensor* t) { return reinterpret_cast<const Allocation*>(t)->stream; }
bool is_pinned(const lctx_tensor* t) { return reinterpret_cast<const Allocation*>(t)->pinned; }

const lctx_api* own_api() { return &kApi; }

}  // namespace lctx

/* Exported on purpose: how a second copy of @lc/tensor in the same process finds the first. */
extern "C" __attribute__((visibility("default"))) const lctx_api* lctx_tensor_api_v1() { return lctx::own_api(); }

namespace lctx {
/* The first loaded copy wins. dl_iterate_phdr visits objects in load order, and the loader serialises loading, so every copy in every
 * worker finds the same one; no lock, file or environment variable is needed. */
const lctx_api* process_api() {
  static const lctx_api* const found = [] {
    const lctx_api* table = nullptr;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          if (!info->dlpi_name || !std::strstr(info->dlpi_name, ".node")) return 0;
          void* object = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
          if (!object) return 0;
          auto get = reinterpret_cast<const lctx_api* (*)()>(dlsym(object, "lctx_tensor_api_v1"));
          if (get) *static_cast<const lctx_api**>(out) = get();
          dlclose(object);
          return get ? 1 : 0;
        },
        &table);
    return table ? table : own_api();
  }();
  return found;
}
}  // namespace lctx
