/* cuBLASLt through dlopen: it is not part of the driver and has no npm source, so nothing links it. Types are declared from NVIDIA's documentation; only
 * what is used. Loaded at the first GEMM (the library has some 450 MB). */
#ifdef LCTX_WITH_CUDA
#include <cuda_runtime.h>
#include <dirent.h>
#include <dlfcn.h>
#include <library_types.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_kernels.h"
#include "cuda_rt.h"
#include "runtime.h"

namespace lctx::cuda {
namespace {

using Handle = void*;
using Desc = void*;
using Layout = void*;
using Preference = void*;
struct Algo { uint64_t data[8]; };
struct Heuristic {
  Algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
constexpr int kCompute32F = 68, kDescTransA = 3, kDescTransB = 4, kDescEpilogue = 7, kDescBiasPointer = 8, kEpilogueBias = 4, kPrefMaxWorkspace = 1, kPrefMinAlignment[] = {5, 6, 7, 8}, kOpN = 0, kOpT = 1;
constexpr size_t kWorkspace = 32u << 20;

struct Library {
  std::string path;
  int (*create)(Handle*) = nullptr;
  int (*desc_create)(Desc*, int, int) = nullptr;
  int (*desc_destroy)(Desc) = nullptr;
  int (*desc_set)(Desc, int, const void*, size_t) = nullptr;
  int (*layout_create)(Layout*, int, uint64_t, uint64_t, int64_t) = nullptr;
  int (*layout_destroy)(Layout) = nullptr;
  int (*pref_create)(Preference*) = nullptr;
  int (*pref_destroy)(Preference) = nullptr;
  int (*pref_set)(Preference, int, const void*, size_t) = nullptr;
  int (*heuristic)(Handle, Desc, Layout, Layout, Layout, Layout, Preference, int, Heuristic*, int*) = nullptr;
  int (*matmul)(Handle, Desc, const void*, const void*, Layout, const void*, Layout, const void*, const void*, Layout, void*, Layout, const Algo*, void*, size_t,
                cudaStream_t) = nullptr;
  bool ok = false;
};

/* Folders that pip's wheels of an environment keep the library in. */
void python_folders(const char* environment, std::vector<std::string>* out) {
  if (!environment || !*environment) return;
  const std::string lib = std::string(environment) + "/lib";
  DIR* dir = opendir(lib.c_str());
  if (!dir) return;
  while (const dirent* entry = readdir(dir)) {
    if (std::string(entry->d_name).rfind("python", 0) != 0) continue;
    const std::string site = lib + "/" + entry->d_name + "/site-packages/nvidia/";
    out->push_back(site + "cu13/lib");
    out->push_back(site + "cublas/lib");
  }
  closedir(dir);
}

Library load() {
  Library l;
  std::vector<std::string> files;
  if (const char* wish = std::getenv("LCTX_CUBLASLT")) {
    files.push_back(wish);
  } else {
    std::vector<std::string> folders = {""};
    for (const char* name : {"CUDA_HOME", "CUDA_PATH"})
      if (const char* home = std::getenv(name)) folders.push_back(std::string(home) + "/lib64");
    for (const char* folder : {"/usr/local/cuda/lib64", "/opt/cuda/lib64", "/usr/local/cuda-13/lib64", "/usr/local/cuda-12/lib64"}) folders.push_back(folder);
    if (const char* conda = std::getenv("CONDA_PREFIX")) folders.push_back(std::string(conda) + "/lib");
    python_folders(std::getenv("VIRTUAL_ENV"), &folders);
    for (const char* soname : {"libcublasLt.so.13", "libcublasLt.so.12"})
      for (const std::string& folder : folders) files.push_back(folder.empty() ? soname : folder + "/" + soname);
  }
  void* object = nullptr;
  for (const std::string& file : files) {
    object = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (object) {
      l.path = file;
      break;
    }
  }
  if (!object) return l;
  bool all = true;
  auto get = [&](auto& fn, const char* name) {
    fn = reinterpret_cast<std::remove_reference_t<decltype(fn)>>(dlsym(object, name));
    all = all && fn;
  };
  get(l.create, "cublasLtCreate");
  get(l.desc_create, "cublasLtMatmulDescCreate");
  get(l.desc_destroy, "cublasLtMatmulDescDestroy");
  get(l.desc_set, "cublasLtMatmulDescSetAttribute");
  get(l.layout_create, "cublasLtMatrixLayoutCreate");
  get(l.layout_destroy, "cublasLtMatrixLayoutDestroy");
  get(l.pref_create, "cublasLtMatmulPreferenceCreate");
  get(l.pref_destroy, "cublasLtMatmulPreferenceDestroy");
  get(l.pref_set, "cublasLtMatmulPreferenceSetAttribute");
  get(l.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  get(l.matmul, "cublasLtMatmul");
  l.ok = all;
  return l;
}
const Library& library() {
  static const Library* l = new Library(load());
  return *l;
}

struct Plan {
  Desc desc = nullptr;
  Layout a = nullptr, b = nullptr, c = nullptr;
  Algo algo{};
  bool ok = false;
};
using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int, int, int, bool, bool>;

struct DeviceState {
  Handle handle = nullptr;
  std::map<void*, void*> workspaces; /* one per stream: two GEMMs at once may not share */
  std::map<Key, Plan> plans;
};
std::mutex g_mutex;
std::map<int, DeviceState>& states() {
  static auto* all = new std::map<int, DeviceState>();
  return *all;
}

int type_of(int32_t dtype) { return dtype == LCTX_F32 ? CUDA_R_32F : CUDA_R_16BF; }

/* cuBLASLt is column-major: row-major c = op(a) op(b) is column-major c^T = op(b)^T op(a)^T, so b comes first and nothing moves. */
Plan make_plan(const Library& l, Handle handle, const lctx_gemm_params* p, const void* bias) {
  Plan plan;
  if (l.desc_create(&plan.desc, kCompute32F, CUDA_R_32F)) return plan;
  const int ta = p->trans_b ? kOpT : kOpN, tb = p->trans_a ? kOpT : kOpN;
  l.desc_set(plan.desc, kDescTransA, &ta, sizeof ta);
  l.desc_set(plan.desc, kDescTransB, &tb, sizeof tb);
  // A bias of c^T's rows, in c's dtype.
  if (bias && (l.desc_set(plan.desc, kDescEpilogue, &kEpilogueBias, sizeof kEpilogueBias) || l.desc_set(plan.desc, kDescBiasPointer, &bias, sizeof bias))) return plan;
  const auto n = static_cast<uint64_t>(p->n), m = static_cast<uint64_t>(p->m), k = static_cast<uint64_t>(p->k);
  if (l.layout_create(&plan.a, type_of(p->b_dtype), p->trans_b ? k : n, p->trans_b ? n : k, p->ldb) ||
      l.layout_create(&plan.b, type_of(p->a_dtype), p->trans_a ? m : k, p->trans_a ? k : m, p->lda) || l.layout_create(&plan.c, type_of(p->c_dtype), n, m, p->ldc))
    return plan;
  Preference preference = nullptr;
  if (l.pref_create(&preference)) return plan;
  l.pref_set(preference, kPrefMaxWorkspace, &kWorkspace, sizeof kWorkspace);
  const uint32_t alignment = 16;  // it assumes 256 bytes otherwise; views start anywhere
  for (const int operand : kPrefMinAlignment) l.pref_set(preference, operand, &alignment, sizeof alignment);
  Heuristic found{};
  int count = 0;
  plan.ok = l.heuristic(handle, plan.desc, plan.a, plan.b, plan.c, plan.c, preference, 1, &found, &count) == 0 && count > 0;
  plan.algo = found.algo;
  l.pref_destroy(preference);
  return plan;
}

}  // namespace

const char* cublaslt_path() { return library().ok ? library().path.c_str() : ""; }

void cublaslt_forget(void* stream) {
  std::lock_guard<std::mutex> lock(g_mutex);
  for (auto& [device, s] : states()) {
    const auto at = s.workspaces.find(stream);
    if (at == s.workspaces.end()) continue;
    if (at->second) cuda::free(device, at->second, stream);
    s.workspaces.erase(at);
  }
}

int cublaslt_gemm(const lctx_gemm_params* p, const void* bias, void* stream) {
  const bool bf16 = p->a_dtype == LCTX_BF16 && p->b_dtype == LCTX_BF16 && (p->c_dtype == LCTX_BF16 || p->c_dtype == LCTX_F32);
  const bool f32 = p->a_dtype == LCTX_F32 && p->b_dtype == LCTX_F32 && p->c_dtype == LCTX_F32;
  const bool aligned = reinterpret_cast<uintptr_t>(p->a) % 16 == 0 && reinterpret_cast<uintptr_t>(p->b) % 16 == 0 && reinterpret_cast<uintptr_t>(p->c) % 16 == 0;
  if (!(bf16 || f32) || !aligned || p->m == 0 || p->n == 0 || p->k == 0 || !library().ok) return 1;
  const Library& l = library();
  std::lock_guard<std::mutex> lock(g_mutex);
  DeviceState& s = states()[p->device_id];
  if (!s.handle && l.create(&s.handle)) return 1;
  void*& workspace = s.workspaces[stream];
  if (!workspace && alloc(p->device_id, kWorkspace, stream, false, &workspace)) return -1;
  const Key key{p->device_id, p->m, p->n, p->k, p->lda, p->ldb, p->ldc, p->a_dtype, p->b_dtype, p->c_dtype, p->trans_a, p->trans_b, p->beta == 0, bias != nullptr};
  auto at = s.plans.find(key);
  if (at == s.plans.end()) at = s.plans.emplace(key, make_plan(l, s.handle, p, bias)).first;
  const Plan& plan = at->second;
  if (!plan.ok || (bias && l.desc_set(plan.desc, kDescBiasPointer, &bias, sizeof bias))) return 1;
  const int rc = l.matmul(s.handle, plan.desc, &p->alpha, p->b, plan.a, p->a, plan.b, &p->beta, p->c, plan.c, p->c, plan.c, &plan.algo, workspace, kWorkspace,
                          static_cast<cudaStream_t>(stream));
  if (rc) return set_error("ERR_LC_CUDA", ("cublasLtMatmul failed with status " + std::to_string(rc)).c_str());
  return 0;
}

}  // namespace lctx::cuda
#endif
