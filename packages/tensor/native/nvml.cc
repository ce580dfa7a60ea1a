#ifdef LCTX_WITH_CUDA
#include "nvml.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

namespace lctx::cuda::nvml {
namespace {

using Handle = void*;
struct Memory {
  unsigned long long total, free, used;
};
struct ProcessInfo {
  unsigned pid;
  unsigned long long bytes;
  unsigned gpu_instance, compute_instance;
};

struct Library {
  int (*by_pci)(const char*, Handle*) = nullptr;
  int (*memory)(Handle, Memory*) = nullptr;
  int (*running)(Handle, unsigned*, ProcessInfo*) = nullptr;
  bool ok = false;
};

Library load() {
  Library l;
  void* object = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!object) return l;
  auto get = [&](auto& fn, const char* name) { fn = reinterpret_cast<std::remove_reference_t<decltype(fn)>>(dlsym(object, name)); };
  int (*init)() = nullptr;
  get(init, "nvmlInit_v2");
  get(l.by_pci, "nvmlDeviceGetHandleByPciBusId_v2");
  get(l.memory, "nvmlDeviceGetMemoryInfo");
  get(l.running, "nvmlDeviceGetComputeRunningProcesses_v3");
  l.ok = init && l.by_pci && l.memory && init() == 0;
  return l;
}
const Library& library() {
  static const Library* l = new Library(load());
  return *l;
}

/* CUDA and NVML count devices in different orders; the place on the bus is the same in both. */
bool handle_of(int device, Handle* out) {
  if (!library().ok) return false;
  char bus[32];
  if (cudaDeviceGetPCIBusId(bus, sizeof bus, device) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return library().by_pci(bus, out) == 0;
}

}  // namespace

bool used(int device, uint64_t* bytes) {
  Handle h;
  Memory m{};
  if (!handle_of(device, &h) || library().memory(h, &m) != 0) return false;
  *bytes = m.used;
  return true;
}

bool processes(int device, std::vector<Process>* out) {
  Handle h;
  if (!handle_of(device, &h) || !library().running) return false;
  std::vector<ProcessInfo> infos(64);
  auto count = static_cast<unsigned>(infos.size());
  if (library().running(h, &count, infos.data()) != 0) return false;
  out->clear();
  for (unsigned i = 0; i < count; i++) out->push_back({infos[i].pid, infos[i].bytes});
  return true;
}

}  // namespace lctx::cuda::nvml
#endif
