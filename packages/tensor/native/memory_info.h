/* RAM of this machine as this process may use it: /proc/meminfo and the cgroup (v1 or v2) limits. */
#ifndef LCTX_MEMORY_INFO_H
#define LCTX_MEMORY_INFO_H
#include <cstdint>

namespace lctx {
struct HostMemory {
  uint64_t total, available;
};
HostMemory host_memory_info();
}  // namespace lctx
#endif
