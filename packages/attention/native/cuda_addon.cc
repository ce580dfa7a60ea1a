#ifdef LCTX_WITH_CUDA
#include "cuda_addon.h"

#include <algorithm>
#include <cstdlib>

#include "cuda_kernels.h"
#include "lctx/cuda_glue.h"
#include "lctx/shared_memory.h"

namespace attention::cuda {
namespace {

using lctx::Args;
using lctx::View;

void require(const Args& a, bool ok, const char* code, const std::string& what) {
  if (!ok) a.fail(code, what);
}

/* [rows, heads, dim] on the GPU. Kernels load 16 bytes at a time, and add to pairs of f32. */
View rows(const Args& a, const char* key, int32_t dtype, const View* like = nullptr) {
  const View v = a.tensor(key);
  const int64_t align = dtype == LCTX_BF16 ? 16 : 8, item = static_cast<int64_t>(lctx::item_size(dtype));
  require(a, lctx::on_cuda(v) && (like == nullptr || v.device.device_id == like->device.device_id), "ERR_LC_DEVICE", std::string(key) + ": expected on the same GPU as q");
  require(a, v.dtype == dtype, "ERR_LC_DTYPE", std::string(key) + ": expected " + lctx::dtype_name(dtype) + " on a GPU, got " + v.describe());
  require(a, v.ndim == 3, "ERR_LC_SHAPE", std::string(key) + " must have 3 dimensions");
  require(a, v.rows_packed(), "ERR_LC_STRIDES", std::string(key) + ": only the first dimension may be strided, got " + v.describe());
  require(a, v.numel() == 0 || (reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(align) == 0 && v.row_stride() * item % align == 0), "ERR_LC_STRIDES",
          std::string(key) + ": on a GPU rows must begin at multiples of " + std::to_string(align) + " bytes");
  return v;
}

/* A contiguous list on the same GPU, or null. */
template <class T>
T* list(const Args& a, const char* key, int32_t dtype, int64_t count, const View& like) {
  const View v = a.optional(key);
  if (!v) return nullptr;
  require(a, v.dtype == dtype && v.contiguous() && v.numel() >= count && lctx::on_cuda(v) && v.device.device_id == like.device.device_id, "ERR_LC_SHAPE",
          std::string(key) + ": expected " + std::to_string(count) + " " + lctx::dtype_name(dtype) + ", contiguous, on the same GPU as q, got " + v.describe());
  return v.as<T>();
}
template <class T>
T* needed(const Args& a, const char* key, int32_t dtype, int64_t count, const View& like) {
  T* found = list<T>(a, key, dtype, count, like);
  require(a, found != nullptr, "ERR_LC_ARGUMENT", std::string(key) + " is required");
  return found;
}

void launched(const Args& a, int error) {
  if (error != cudaSuccess && lctx::cuda::shared_memory_limit() < kSharedEverywhere) {
    cudaGetLastError();
    a.fail("ERR_LC_CUDA", "a block may take " + std::to_string(lctx::cuda::shared_memory_limit()) + " bytes of shared memory here, and attention's kernels take up to " +
                              std::to_string(kSharedEverywhere) + "; if LCTX_SMEM_LIMIT is set, set it to 99KiB or more");
  }
  lctx::cuda_must(a, error);
}

Problem problem(const Args& a, const View& q) {
  const View k = rows(a, "k", LCTX_BF16, &q), v = rows(a, "v", LCTX_BF16, &q);
  const int64_t start = a.integer("start"), n = q.shape[0], heads = q.shape[1], dim = q.shape[2], kv_heads = k.shape[1], window = a.integer("window", 0);
  require(a, heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads <= 1 << 20, "ERR_LC_SHAPE", "heads must be a multiple of K/V heads");
  require(a, dim % 8 == 0 && dim >= 8 && dim <= kMaxDim, "ERR_LC_SHAPE",
          "headDim is " + std::to_string(dim) + "; on a GPU it must be a multiple of 8 from 8 to " + std::to_string(kMaxDim) + " (use device 'cpu' for others)");
  require(a, k.shape[2] == dim && v.shape[2] == dim && v.shape[1] == kv_heads, "ERR_LC_SHAPE", "k and v must be [T, kvHeads, headDim]");
  require(a, start >= 0 && start <= INT32_MAX && start + n <= INT32_MAX && n * (heads / kv_heads) <= INT32_MAX - 1024, "ERR_LC_SHAPE",
          "start + n, and n * heads / kvHeads, must stay below 2^31; pass smaller chunks");
  require(a, start + n <= k.shape[0] && start + n <= v.shape[0], "ERR_LC_SHAPE", "start + n passes the end of k or v");
  Problem p{};
  p.q = q.data, p.k = k.data, p.v = v.data;
  p.q_stride = q.row_stride(), p.k_stride = k.row_stride(), p.v_stride = v.row_stride();
  p.n = static_cast<int32_t>(n), p.heads = static_cast<int32_t>(heads), p.kv_heads = static_cast<int32_t>(kv_heads);
  set_group(p, p.heads / p.kv_heads);
  p.dim = static_cast<int32_t>(dim), p.start = static_cast<int32_t>(start);
  p.window = window > 0 && window < start + n ? static_cast<int32_t>(window) : 0;
  p.scale = static_cast<float>(a.number("scale"));
  p.doc_start = list<int32_t>(a, "docStart", LCTX_I32, n, q);
  p.sinks = list<float>(a, "sinks", LCTX_F32, heads, q);
  return p;
}

/* Whether a pass runs on Hopper's own kernels. `refused`: why they do not take this problem, or null; asked with q's device current. */
bool on_hopper(const Args& a, const char* refused) {
  const char* wish = std::getenv("LCTX_ATTENTION");
  const std::string path = wish ? wish : "";
  require(a, path.empty() || path == "portable" || path == "hopper", "ERR_LC_ARGUMENT", "LCTX_ATTENTION=" + path + ": expected 'portable' or 'hopper', or leave it unset");
  require(a, path != "hopper" || refused == nullptr, "ERR_LC_DEVICE", std::string("LCTX_ATTENTION=hopper: ") + (refused ? refused : "") + "; unset it to take the portable kernels");
  return path != "portable" && refused == nullptr;
}

View same_rows(const Args& a, const char* key, const View& q) {
  const View v = rows(a, key, LCTX_BF16, &q);
  require(a, v.shape[0] == q.shape[0] && v.shape[1] == q.shape[1] && v.shape[2] == q.shape[2], "ERR_LC_SHAPE", "q, out, dout and dq must have one shape");
  return v;
}

}  // namespace

void forward(const Args& a) {
  const View q = rows(a, "q", LCTX_BF16);
  Forward f{};
  f.p = problem(a, q);
  const View out = same_rows(a, "out", q);
  f.out = out.data, f.out_stride = out.row_stride();
  f.lse = needed<float>(a, "lse", LCTX_F32, q.shape[0] * q.shape[1], q);
  const cudaStream_t stream = lctx::cuda_stream(a, q);
  launched(a, on_hopper(a, hopper_forward_refuses(f.p)) ? hopper_forward(f, stream) : forward(f, stream));
}

void backward(const Args& a) {
  const View q = rows(a, "q", LCTX_BF16);
  Backward b{};
  b.p = problem(a, q);
  const int64_t count = q.shape[0] * q.shape[1];
  const View out = same_rows(a, "out", q), dout = same_rows(a, "dout", q), dq = same_rows(a, "dq", q);
  const View dk = rows(a, "dk", LCTX_F32, &q), dv = rows(a, "dv", LCTX_F32, &q);
  for (const View& g : {dk, dv})
    require(a, g.shape[0] >= b.p.start + b.p.n && g.shape[1] == b.p.kv_heads && g.shape[2] == b.p.dim, "ERR_LC_SHAPE", "dk and dv must be [T, kvHeads, headDim]");
  b.out = out.data, b.out_stride = out.row_stride();
  b.dout = dout.data, b.dout_stride = dout.row_stride();
  b.dq = dq.data, b.dq_stride = dq.row_stride();
  b.dk = dk.as<float>(), b.dk_stride = dk.row_stride();
  b.dv = dv.as<float>(), b.dv_stride = dv.row_stride();
  b.lse = needed<float>(a, "lse", LCTX_F32, count, q);
  b.delta = needed<float>(a, "delta", LCTX_F32, count, q);
  b.dsinks = list<float>(a, "dSinks", LCTX_F32, q.shape[1], q);
  require(a, b.dsinks == nullptr || b.p.sinks != nullptr, "ERR_LC_ARGUMENT", "dSinks needs sinks");
  if (b.dsinks) b.sink_partial = needed<float>(a, "partial", LCTX_F32, kSinkParts * q.shape[1], q);
  if (const int64_t floats = backward_fused_floats(b.p)) b.dq_sum = list<float>(a, "dqSum", LCTX_F32, floats, q);
  const cudaStream_t stream = lctx::cuda_stream(a, q);
  if (on_hopper(a, hopper_backward_refuses(b))) {
    if (const int64_t floats = hopper_backward_floats(b.p)) b.hopper = needed<float>(a, "hopper", LCTX_F32, floats, q);
    b.ordered = !a.flag("anyOrder");
    launched(a, hopper_backward(b, stream));
  } else launched(a, backward(b, stream));
}

int hopper() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return -1;
  const char* wish = std::getenv("LCTX_ATTENTION");
  return hopper_card() && (wish == nullptr || std::string(wish) != "portable");
}

void rope(const Args& a) {
  const View x = a.tensor("x");
  require(a, x.dtype == LCTX_BF16 || x.dtype == LCTX_F32, "ERR_LC_DTYPE", "x must be bf16 or f32 on a GPU, got " + x.describe());
  require(a, x.ndim == 3 && x.rows_packed(), "ERR_LC_STRIDES", "x must be [n, heads, headDim] with packed heads, got " + x.describe());
  const Napi::Value table = a.value("invFreq");
  require(a, table.IsTypedArray() && table.As<Napi::TypedArray>().TypedArrayType() == napi_float64_array, "ERR_LC_ARGUMENT", "rope.invFreq must be a Float64Array; make it with ropeInit");
  const Napi::Float64Array inv_freq = table.As<Napi::Float64Array>();
  const int64_t pairs = static_cast<int64_t>(inv_freq.ElementLength()), start = a.integer("start");
  require(a, pairs >= 1 && pairs * 2 <= x.shape[2] && pairs <= kMaxRopePairs, "ERR_LC_ARGUMENT",
          "rope.rotaryDim must be at most headDim, and on a GPU " + std::to_string(2 * kMaxRopePairs));
  require(a, start >= 0 && start <= INT32_MAX && start + x.shape[0] <= INT32_MAX && x.shape[1] * x.shape[2] <= 1 << 24, "ERR_LC_ARGUMENT", "start or heads is out of range");
  Rope r{};
  r.x = x.data, r.f32 = x.dtype == LCTX_F32;
  r.n = x.shape[0], r.stride = x.row_stride();
  r.heads = static_cast<int32_t>(x.shape[1]), r.dim = static_cast<int32_t>(x.shape[2]), r.pairs = static_cast<int32_t>(pairs), r.start = static_cast<int32_t>(start);
  r.doc_start = list<int32_t>(a, "docStart", LCTX_I32, x.shape[0], x);
  r.sign = a.flag("transpose") ? -1.0f : 1.0f;
  r.factor = a.number("factor");
  std::copy_n(inv_freq.Data(), pairs, r.inv_freq);
  const cudaStream_t stream = lctx::cuda_stream(a, x);
  lctx::cuda_must(a, rope(r, stream));
}

}  // namespace attention::cuda
#endif
