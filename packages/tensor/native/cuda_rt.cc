#ifdef LCTX_WITH_CUDA
#include "cuda_rt.h"

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "cpu_kernels.h"
#include "cuda_kernels.h"
#include "device_budget.h"
#include "runtime.h"

#ifndef LCTX_CUDA_TARGETS
#define LCTX_CUDA_TARGETS "?"
#endif

namespace lctx::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kMinDriver = 13000;  // CUDA 13: R580

struct Device {
  std::mutex mutex;
  bool checked = false;
  cudaMemPool_t pool = nullptr;
  cudaStream_t stream = nullptr;
  std::mutex memory;  // guards the budget, and allocations while it matters who grew the pool
  DeviceBudget budget;
};
Device& device_state(int device) {
  static auto* all = new Device[kMaxDevices];  // never destroyed: frees may come during process exit
  return all[device];
}

int fail(const char* code, const std::string& message) { return set_error(code, message.c_str()); }

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
  cudaGetLastError();
  return version;
}

/* Makes a device current for this scope. */
struct Current {
  int before = -1;
  explicit Current(int device) {
    if (cudaGetDevice(&before) != cudaSuccess) before = -1;
    if (before != device) cudaSetDevice(device);
    else before = -1;
  }
  ~Current() {
    if (before >= 0) cudaSetDevice(before);
  }
};

std::string gib(uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1u << 30));
  return text;
}

uint64_t pool_bytes(const Device& d, cudaMemPoolAttr what) {
  uint64_t bytes = 0;
  cudaMemPoolGetAttribute(d.pool, what, &bytes);
  return bytes;
}
uint64_t reserved(const Device& d) { return pool_bytes(d, cudaMemPoolAttrReservedMemCurrent); }
uint64_t unused(const Device& d) {
  const uint64_t used = pool_bytes(d, cudaMemPoolAttrUsedMemCurrent), all = reserved(d);
  return all > used ? all - used : 0;
}

/* The pool grows by whole pieces of 32 MiB. */
constexpr uint64_t kPiece = 32u << 20;
uint64_t growth(uint64_t bytes) { return (bytes + kPiece - 1) / kPiece * kPiece; }

/* Gives the driver back what the pool holds and nobody uses. Waits for the device: frees that other streams have not reached yet may be what is missing. */
void trim(Device& d) {
  cudaDeviceSynchronize();
  cudaMemPoolTrimTo(d.pool, 0);
}

/* Whether the pool may grow for this. Large requests leave a piece to the scratch that kernels take in a step. */
bool may_grow(const Device& d, uint64_t bytes) { return !d.budget.exceeds(reserved(d) + growth(bytes) + (bytes > kPiece ? kPiece : 0)); }
/* Where the pool may not grow, a request up to a piece may try its gaps: nobody can tell beforehand whether it fits one. */
bool may_try(const Device& d, uint64_t bytes) { return may_grow(d, bytes) || (bytes <= kPiece && unused(d) >= bytes); }

/* Allocates. One that made the pool grow beyond the limit, by a piece at most, is taken back at once. */
cudaError_t within_limit(Device& d, size_t bytes, cudaStream_t stream, void** out) {
  const uint64_t before = reserved(d);
  const cudaError_t e = cudaMallocFromPoolAsync(out, bytes, d.pool, stream);
  const uint64_t now = reserved(d);
  if (e != cudaSuccess || now == before) return e;
  d.budget.sample(now);
  if (now < before || !d.budget.exceeds(now)) return e;
  cudaFreeAsync(*out, stream);
  trim(d);
  return cudaErrorMemoryAllocation;
}

}  // namespace

int status(int error, const char* what) {
  if (error == cudaSuccess) return 0;
  cudaGetLastError();
  const auto e = static_cast<cudaError_t>(error);
  return fail(e == cudaErrorMemoryAllocation ? "ERR_LC_OUT_OF_MEMORY" : "ERR_LC_CUDA",
              std::string(what) + ": " + cudaGetErrorName(e) + ": " + cudaGetErrorString(e));
}

int device_count() {
  static const int count = [] {
    int n = 0;
    if (driver_version() < kMinDriver || cudaGetDeviceCount(&n) != cudaSuccess) n = 0;
    cudaGetLastError();
    return std::min(n, kMaxDevices);
  }();
  return count;
}

int check(int device) {
  const int driver = driver_version();
  if (driver == 0) return fail("ERR_LC_NO_DRIVER", "no NVIDIA driver on this machine; install driver R580 or newer (nvidia-smi shows it), or use device 'cpu'");
  if (driver < kMinDriver)
    return fail("ERR_LC_DRIVER_TOO_OLD", "the NVIDIA driver supports CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
                                             ", lc needs CUDA 13 (driver R580 or newer); update the driver, or use device 'cpu'");
  if (device < 0 || device >= device_count())
    return fail("ERR_LC_NO_DEVICE", "cuda:" + std::to_string(device) + " is not there: the driver shows " + std::to_string(device_count()) +
                                        " GPUs; check CUDA_VISIBLE_DEVICES, or use device 'cpu'");
  Device& d = device_state(device);
  std::lock_guard<std::mutex> lock(d.mutex);
  if (d.checked) return 0;
  d.budget.before_context(device);
  Current current(device);
  const int probe = probe_kernel_image();
  if (probe == cudaErrorNoKernelImageForDevice || probe == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    return fail("ERR_LC_NO_KERNEL_IMAGE", std::string(p.name) + " has compute capability " + std::to_string(p.major) + "." + std::to_string(p.minor) +
                                              ", this build has code for " LCTX_CUDA_TARGETS "; rebuild with LCTX_CUDA_ARCHS=" +
                                              std::to_string(p.major * 10 + p.minor) + ", or install a release build");
  }
  if (status(probe, "first CUDA call")) return -1;
  cudaMemPoolProps props{};
  props.allocType = cudaMemAllocationTypePinned;
  props.location = {cudaMemLocationTypeDevice, {device}};
  if (status(cudaMemPoolCreate(&d.pool, &props), "cudaMemPoolCreate")) return -1;
  uint64_t keep = UINT64_MAX;  // freed memory stays ours: no allocation inside a step reaches the driver
  cudaMemPoolSetAttribute(d.pool, cudaMemPoolAttrReleaseThreshold, &keep);
  if (status(cudaStreamCreateWithFlags(&d.stream, cudaStreamNonBlocking), "cudaStreamCreate")) return -1;
  d.budget.after_context(device);
  d.checked = true;
  return 0;
}

int device_info(int device, DeviceInfo* out) {
  if (check(device)) return -1;
  cudaDeviceProp p;
  if (status(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties")) return -1;
  out->name = p.name;
  char uuid[48];
  const auto* b = reinterpret_cast<const unsigned char*>(p.uuid.bytes);
  std::snprintf(uuid, sizeof uuid, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7],
                b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
  out->uuid = uuid;
  out->major = p.major;
  out->minor = p.minor;
  out->driver = driver_version();
  cudaRuntimeGetVersion(&out->runtime);
  return mem_info(device, &out->free_bytes, &out->total_bytes);
}

int mem_info(int device, uint64_t* free_bytes, uint64_t* total_bytes) {
  if (check(device)) return -1;
  Current current(device);
  size_t f = 0, t = 0;
  if (status(cudaMemGetInfo(&f, &t), "cudaMemGetInfo")) return -1;
  Device& d = device_state(device);
  std::lock_guard<std::mutex> lock(d.memory);
  *free_bytes = f + unused(d);
  *total_bytes = t;
  if (d.budget.limit) {
    const uint64_t held = reserved(d);
    d.budget.sample(held);
    const uint64_t taken = d.budget.taken(held) - unused(d);
    *total_bytes = std::min<uint64_t>(t, d.budget.limit);
    *free_bytes = std::min(*free_bytes, d.budget.limit > taken ? d.budget.limit - taken : 0);
  }
  return 0;
}

int set_limit(int device, uint64_t bytes) {
  if (check(device)) return -1;
  Current current(device);
  Device& d = device_state(device);
  std::lock_guard<std::mutex> lock(d.memory);
  d.budget.sample(reserved(d));
  if (bytes && d.budget.taken(reserved(d)) > bytes) {
    trim(d);
    d.budget.sample(reserved(d));
    const uint64_t taken = d.budget.taken(reserved(d));
    if (taken > bytes)
      return fail("ERR_LC_OUT_OF_MEMORY", "a limit of " + gib(bytes) + " on cuda:" + std::to_string(device) + " (vramLimit) is less than the " + gib(taken) +
                                              " that this process takes already, " + gib(d.budget.outside()) + " of them for the CUDA context and libraries; raise it, or free memory first");
  }
  d.budget.limit = bytes;
  return 0;
}

int process_memory(int device, lctx_process_memory* out) {
  if (check(device)) return -1;
  Current current(device);
  Device& d = device_state(device);
  std::lock_guard<std::mutex> lock(d.memory);
  const uint64_t held = reserved(d);
  d.budget.sample(held);
  const uint64_t high = pool_bytes(d, cudaMemPoolAttrReservedMemHigh);
  *out = {sizeof *out, d.budget.source(), d.budget.taken(held), std::max(d.budget.peak(), d.budget.outside() + high), held, held - unused(d), d.budget.limit};
  return 0;
}

void reset_peaks() {
  for (int device = 0; device < device_count(); device++) {
    Device& d = device_state(device);
    {
      std::lock_guard<std::mutex> lock(d.mutex);
      if (!d.checked) continue;
    }
    Current current(device);
    std::lock_guard<std::mutex> lock(d.memory);
    uint64_t zero = 0;  // the only value that it takes: from now on
    cudaMemPoolSetAttribute(d.pool, cudaMemPoolAttrReservedMemHigh, &zero);
    d.budget.reset_peak(reserved(d));
  }
}

int alloc(int device, size_t bytes, void* stream, bool zero, void** out) {
  if (check(device)) return -1;
  Current current(device);
  const auto s = static_cast<cudaStream_t>(stream);
  Device& d = device_state(device);
  cudaError_t e = cudaErrorMemoryAllocation;
  {
    std::lock_guard<std::mutex> lock(d.memory);
    if (may_try(d, bytes)) e = within_limit(d, bytes, s, out);
    if (e == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      trim(d);
      d.budget.sample(reserved(d));
      if (may_try(d, bytes)) e = within_limit(d, bytes, s, out);
    }
  }
  if (e == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    uint64_t f = 0, t = 0;
    mem_info(device, &f, &t);
    const std::string where = "allocating " + gib(bytes) + " failed on cuda:" + std::to_string(device) + ": ";
    const std::string what = d.budget.limit ? "the limit of " + gib(d.budget.limit) + " (vramLimit), which counts the CUDA context and libraries too (" + gib(d.budget.outside()) +
                                                  "), leaves " + gib(f)
                                            : gib(f) + " of " + gib(t) + " free";
    return fail("ERR_LC_OUT_OF_MEMORY", where + what + "; use a shorter sequence or smaller chunks, or free memory (memory() lists what lc holds)");
  }
  if (status(e, "cudaMallocAsync")) return -1;
  return zero ? status(cudaMemsetAsync(*out, 0, bytes, s), "cudaMemsetAsync") : 0;
}

void free(int device, void* p, void* stream) {
  Current current(device);
  cudaFreeAsync(p, static_cast<cudaStream_t>(stream));  // at process exit this fails (cudaErrorCudartUnloading), and so it should
  cudaGetLastError();
}

int host_alloc(size_t bytes, void** out, bool* pinned) {
  *out = nullptr;
  *pinned = false;
  // cudaHostAlloc touches its pages one by one. Huge pages touched by all threads and then registered take a tenth of the time.
  constexpr size_t kHuge = 2u << 20;
  const size_t size = (bytes + kHuge - 1) / kHuge * kHuge;
  if (check(0)) return -1;
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return 0;
  madvise(p, size, MADV_HUGEPAGE);
  char* bytes_at = static_cast<char*>(p);
  cpu::parallel(0, static_cast<int64_t>(size / 4096), 16384, [&](int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; page++) bytes_at[page * 4096] = 0;
  });
  Current current(0);
  if (cudaHostRegister(p, size, cudaHostRegisterPortable) != cudaSuccess) {
    cudaGetLastError();
    munmap(p, size);
    return 0;
  }
  *out = p;
  *pinned = true;
  return 0;
}

void host_free(void* p, size_t bytes, bool pinned) {
  if (!p || !pinned) return;
  constexpr size_t kHuge = 2u << 20;
  // Copies in flight may still touch it, on any device and stream.
  for (int device = 0; device < device_count(); device++) {
    Device& d = device_state(device);
    {
      std::lock_guard<std::mutex> lock(d.mutex);
      if (!d.checked) continue;
    }
    Current current(device);
    cudaDeviceSynchronize();
  }
  cudaHostUnregister(p);
  cudaGetLastError();
  munmap(p, (bytes + kHuge - 1) / kHuge * kHuge);
}

int default_stream(int device, void** out) {
  if (check(device)) return -1;
  *out = device_state(device).stream;
  return 0;
}

int copy_async(void* dst, const void* src, size_t bytes, void* stream) {
  return bytes ? status(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)), "cudaMemcpyAsync") : 0;
}

}  // namespace lctx::cuda
#endif
