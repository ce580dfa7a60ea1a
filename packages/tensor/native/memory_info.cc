#include "memory_info.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

namespace lctx {
namespace {

/* First number in a file, or `fallback`; "max" and cgroup v1's "no limit" number count as none. */
uint64_t read_number(const std::string& path, uint64_t fallback) {
  FILE* f = std::fopen(path.c_str(), "r");
  if (!f) return fallback;
  unsigned long long value = 0;
  const bool ok = std::fscanf(f, "%llu", &value) == 1;
  std::fclose(f);
  return ok && value < (1ull << 60) ? value : fallback;
}

/* Value of `key` in a "key value" file such as /proc/meminfo or memory.stat. */
uint64_t read_key(const std::string& path, const char* key) {
  FILE* f = std::fopen(path.c_str(), "r");
  if (!f) return 0;
  char line[256];
  uint64_t value = 0;
  while (std::fgets(line, sizeof line, f)) {
    if (std::strncmp(line, key, std::strlen(key)) == 0) {
      unsigned long long v = 0;
      if (std::sscanf(line + std::strlen(key), "%*[: ]%llu", &v) == 1) value = v;
      break;
    }
  }
  std::fclose(f);
  return value;
}

/* This process's cgroup folder below `controller` ("" for v2), from /proc/self/cgroup. */
std::string cgroup_path(const char* controller) {
  FILE* f = std::fopen("/proc/self/cgroup", "r");
  if (!f) return "";
  char line[1024];
  std::string path;
  while (std::fgets(line, sizeof line, f)) {
    const char* first = std::strchr(line, ':');
    const char* second = first ? std::strchr(first + 1, ':') : nullptr;
    if (!second) continue;
    const std::string names(first + 1, second);
    const bool match = *controller ? ("," + names + ",").find(std::string(",") + controller + ",") != std::string::npos : names.empty();
    if (match) {
      path = second + 1;
      while (!path.empty() && path.back() == '\n') path.pop_back();
      break;
    }
  }
  std::fclose(f);
  return path;
}

}  // namespace

HostMemory host_memory_info() {
  HostMemory m{read_key("/proc/meminfo", "MemTotal") << 10, read_key("/proc/meminfo", "MemAvailable") << 10};
  struct Source { std::string root, limit, usage, reclaimable; };
  const Source sources[] = {
      {"/sys/fs/cgroup" + cgroup_path(""), "/memory.max", "/memory.current", "inactive_file"},
      {"/sys/fs/cgroup", "/memory.max", "/memory.current", "inactive_file"},  // inside a container the path may be hidden
      {"/sys/fs/cgroup/memory" + cgroup_path("memory"), "/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file"},
      {"/sys/fs/cgroup/memory", "/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file"},
  };
  for (const Source& s : sources) {
    const uint64_t limit = read_number(s.root + s.limit, 0);
    if (!limit || limit >= m.total) continue;
    const uint64_t used = read_number(s.root + s.usage, 0);
    const uint64_t reclaimable = std::min(used, read_key(s.root + "/memory.stat", s.reclaimable.c_str()));
    m.total = limit;
    m.available = std::min(m.available, limit - std::min(limit, used - reclaimable));
  }
  return m;
}

}  // namespace lctx
