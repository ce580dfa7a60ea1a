#ifdef LCTX_WITH_CUDA
#include "device_budget.h"

#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "nvml.h"

namespace lctx::cuda {
namespace {

/* Processes that were there before our context came. Only between before_context and after_context, on one thread. */
thread_local std::vector<nvml::Process> t_before;

}  // namespace

void DeviceBudget::before_context(int device) {
  device_ = device;
  had_nvml_ = nvml::used(device, &others_);
  t_before.clear();
  if (had_nvml_) nvml::processes(device, &t_before);
}

void DeviceBudget::after_context(int device) {
  device_ = device;
  std::vector<nvml::Process> now, fresh;
  if (had_nvml_ && nvml::processes(device, &now)) {
    const auto known = [](const nvml::Process& p) { return std::any_of(t_before.begin(), t_before.end(), [&](const nvml::Process& q) { return q.pid == p.pid; }); };
    std::copy_if(now.begin(), now.end(), std::back_inserter(fresh), [&](const nvml::Process& p) { return !known(p); });
    const auto own = std::find_if(now.begin(), now.end(), [](const nvml::Process& p) { return p.pid == static_cast<unsigned>(getpid()); });
    const nvml::Process* found = fresh.size() == 1 ? &fresh[0] : own != now.end() ? &*own : nullptr;
    if (found && found->bytes != UINT64_MAX && found->bytes > 0) {
      pid_ = found->pid;
      source_ = kProcess;
    }
  }
  if (source_ != kProcess) source_ = had_nvml_ ? kDevice : kAll;
  t_before.clear();
  sample(0);
}

bool DeviceBudget::driver_bytes(uint64_t* out) const {
  if (source_ == kProcess) {
    std::vector<nvml::Process> now;
    if (!nvml::processes(device_, &now)) return false;
    for (const nvml::Process& p : now) {
      if (p.pid != pid_ || p.bytes == UINT64_MAX) continue;
      *out = p.bytes;
      return true;
    }
    return false;
  }
  if (source_ == kDevice) {
    uint64_t all = 0;
    if (!nvml::used(device_, &all)) return false;
    *out = all > others_ ? all - others_ : 0;
    return true;
  }
  size_t free_bytes = 0, total = 0;
  if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  *out = total - free_bytes;
  return true;
}

void DeviceBudget::sample(uint64_t reserved) {
  uint64_t now = 0;
  if (driver_bytes(&now) && now >= reserved) outside_ = now - reserved;
  peak_ = std::max(peak_, outside_ + reserved);
}

void DeviceBudget::reset_peak(uint64_t reserved) {
  peak_ = 0;
  sample(reserved);
}

}  // namespace lctx::cuda
#endif
