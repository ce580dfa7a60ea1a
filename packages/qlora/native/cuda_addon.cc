#ifdef LCTX_WITH_CUDA
#include "cuda_addon.h"

#include <cmath>
#include <map>
#include <mutex>

#include "cuda_kernels.h"
#include "lctx/cuda_glue.h"
#include "search.h"

using lctx::Args;
using lctx::View;

namespace lc_qlora::cuda {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

View packed(const Args& args, const View& v, const char* key, int32_t dtype, int64_t numel) {
  if (v.dtype != dtype || !lctx::on_cuda(v) || !v.contiguous() || v.numel() < numel)
    args.fail("ERR_LC_SHAPE", std::string(key) + ": expected " + std::to_string(numel) + " contiguous " + lctx::dtype_name(dtype) + " on the GPU, got " + v.describe());
  return v;
}
View packed(const Args& args, const char* key, int32_t dtype, int64_t numel) { return packed(args, args.tensor(key), key, dtype, numel); }
View floating(const Args& args, const char* key) {
  const View v = args.tensor(key);
  if ((v.dtype != LCTX_F32 && v.dtype != LCTX_BF16) || !v.contiguous() || reinterpret_cast<uintptr_t>(v.data) % 16)
    args.fail("ERR_LC_DTYPE", std::string(key) + ": expected contiguous f32 or bf16, 16-byte aligned, got " + v.describe());
  return v;
}

/* Small device memory that lives as long as the process: maps, partial sums. Grows; the old block stays valid for work in flight. */
void* resident(const Args& args, int device, const char* what, size_t bytes, cudaStream_t stream, bool* fresh) {
  static std::mutex mutex;
  static auto* blocks = new std::map<std::pair<int, std::string>, std::pair<lctx_tensor*, size_t>>();
  std::lock_guard<std::mutex> lock(mutex);
  auto& [tensor, size] = (*blocks)[{device, what}];
  *fresh = size < bytes;
  if (*fresh) {
    const int64_t shape = static_cast<int64_t>(bytes);
    const lctx_alloc_params p{sizeof p, kDLCUDA, device, LCTX_U8, 1, 0, &shape, what, stream};
    lctx_tensor* made = nullptr;
    lctx::check(args.env(), lctx::api()->alloc(&p, &made));
    if (tensor) tensor->release(tensor);  // stream-ordered
    tensor = made;
    size = bytes;
  }
  return tensor->view.data;
}

/* Signed, then unsigned dynamic map: f32 [512]. */
const float* maps(const Args& args, const View& like, cudaStream_t stream) {
  bool fresh = false;
  void* p = resident(args, like.device.device_id, "qlora.maps", 512 * sizeof(float), stream, &fresh);
  if (fresh) {
    lctx::cuda_must(args, cudaMemcpyAsync(p, signed_map().values, 256 * sizeof(float), cudaMemcpyHostToDevice, stream));
    lctx::cuda_must(args, cudaMemcpyAsync(static_cast<float*>(p) + 256, unsigned_map().values, 256 * sizeof(float), cudaMemcpyHostToDevice, stream));
    lctx::cuda_must(args, cudaStreamSynchronize(stream));  // once per process
  }
  return static_cast<const float*>(p);
}

struct Lists {
  const Args& args;
  uint32_t length(const char* key) const {
    const Napi::Value list = args.value(key);
    return list.IsArray() ? list.As<Napi::Array>().Length() : 0;
  }
  View at(const char* key, uint32_t i) const {
    const Napi::Value list = args.value(key);
    if (!list.IsArray() || list.As<Napi::Array>().Length() <= i) args.fail("ERR_LC_ARGUMENT", std::string(key) + ": expected an array of tensors");
    return lctx::tensor(args.env(), list.As<Napi::Array>().Get(i), args.name(key).c_str());
  }
};

}  // namespace

void nf4_dequantize_op(const Args& args) {
  const View out = floating(args, "out");
  const int64_t n = out.numel(), block = args.integer("block");
  if (block < 32 || block > kMaxBlock || (block & (block - 1))) args.fail("ERR_LC_ARGUMENT", "block must be a power of two in 32..4096");
  const int64_t blocks = divide_up(n, block);
  const cudaStream_t stream = lctx::cuda_stream(args, out);
  Nf4Dequantize p{packed(args, "codes", LCTX_U8, divide_up(n, 2)).as<uint8_t>(), n, block, nullptr, nullptr, nullptr, nullptr, out.data, out.dtype};
  const float* map = nullptr;
  if (args.optional("absmax")) {
    p.absmax = packed(args, "absmax", LCTX_F32, blocks).as<float>();
  } else {
    p.codes2 = packed(args, "codes2", LCTX_U8, blocks).as<uint8_t>();
    p.scales = packed(args, "scales", LCTX_F32, divide_up(blocks, kScaleBlock)).as<float>();
    p.offset = packed(args, "offset", LCTX_F32, 1).as<float>();
    map = maps(args, out, stream);
  }
  lctx::cuda_must(args, nf4_dequantize(p, map, stream));
}

void mxfp4_dequantize_op(const Args& args) {
  const View out = floating(args, "out");
  const int64_t n = out.numel();
  if (n % kMxBlock) args.fail("ERR_LC_SHAPE", "the number of elements must be a multiple of 32");
  const Mxfp4 p{packed(args, "blocks", LCTX_U8, n / 2).as<uint8_t>(), packed(args, "scales", LCTX_U8, n / kMxBlock).as<uint8_t>(), n, out.data, out.dtype};
  lctx::cuda_must(args, mxfp4_dequantize(p, lctx::cuda_stream(args, out)));
}

void dropout_op(const Args& args) {
  const View x = args.tensor("x"), out = args.tensor("out");
  const double p = args.number("p");
  if (!(p >= 0 && p < 1)) args.fail("ERR_LC_ARGUMENT", "p must be in [0, 1)");
  if (x.ndim != 2 || out.ndim != 2 || x.shape[0] != out.shape[0] || x.shape[1] != out.shape[1])
    args.fail("ERR_LC_SHAPE", "x " + x.describe() + " and out " + out.describe() + " must be [tokens, width]");
  const DropoutRows d{lctx::device_rows(args, x, "x", out), lctx::device_rows(args, out, "out", out), x.shape[0], x.shape[1],
                      static_cast<uint64_t>(args.integer("seed")), static_cast<uint64_t>(args.integer("start")), static_cast<uint32_t>(args.integer("site")),
                      static_cast<uint32_t>(std::floor(p * 4294967296.0)), static_cast<float>(1.0 / (1.0 - p)), args.flag("accumulate")};
  lctx::cuda_must(args, dropout(d, lctx::cuda_stream(args, out)));
}

void expert_b_op(const Args& args, bool gather) {
  const View grouped = args.tensor("grouped");
  if (grouped.ndim != 3) args.fail("ERR_LC_SHAPE", "grouped: expected [experts, out, rank], got " + grouped.describe());
  packed(args, grouped, "grouped", LCTX_F32, grouped.numel());
  const ExpertB p{packed(args, "b", LCTX_F32, grouped.numel()).as<float>(), grouped.as<float>(), grouped.shape[0], grouped.shape[1], grouped.shape[2]};
  const cudaStream_t stream = lctx::cuda_stream(args, grouped);
  lctx::cuda_must(args, gather ? gather_expert_b(p, stream) : scatter_expert_b(p, stream));
}

double grad_norm_op(const Args& args) {
  const Lists lists{args};
  const uint32_t n = lists.length("grads");
  const View first = lists.at("grads", 0);
  const cudaStream_t stream = lctx::cuda_stream(args, first);
  int64_t chunks = 0;
  for (uint32_t i = 0; i < n; i++) chunks += divide_up(lists.at("grads", i).numel(), kChunk);
  bool fresh = false;
  auto* partial = static_cast<double*>(resident(args, first.device.device_id, "qlora.norm", static_cast<size_t>(chunks + 1) * sizeof(double), stream, &fresh));
  int64_t at = 0;
  for (uint32_t i = 0; i < n;) {
    Gradients g{};
    for (; i < n && g.count < Gradients::kMost; i++, g.count++) {
      const View v = lists.at("grads", i);
      packed(args, v, "grads", LCTX_F32, v.numel());
      const int64_t end = g.chunks[g.count] + divide_up(v.numel(), kChunk);
      if (end > INT32_MAX) args.fail("ERR_LC_ARGUMENT", "grads: more than 2^45 elements in " + std::to_string(Gradients::kMost) + " tensors");
      g.at[g.count] = v.as<float>();
      g.n[g.count] = v.numel();
      g.chunks[g.count + 1] = static_cast<uint32_t>(end);
    }
    lctx::cuda_must(args, square_sums(g, partial + at, stream));
    at += g.chunks[g.count];
  }
  lctx::cuda_must(args, add_up(partial, at, partial + at, stream));
  double total = 0;
  lctx::cuda_must(args, cudaMemcpyAsync(&total, partial + at, sizeof total, cudaMemcpyDeviceToHost, stream));
  lctx::cuda_must(args, cudaStreamSynchronize(stream));  // the step's one read-back: clipping needs the number
  return std::sqrt(total);
}

void adamw_op(const Args& args) {
  const Lists lists{args};
  const bool eight = args.integer("bits") == 8;
  const uint32_t n = lists.length("values");
  if (n == 0) return;
  const View first = lists.at("values", 0);
  const cudaStream_t stream = lctx::cuda_stream(args, first);
  const AdamScalars p{static_cast<float>(args.number("beta2")), static_cast<float>(1.0 - args.number("beta1")), static_cast<float>(1.0 - args.number("beta2")),
                      static_cast<float>(args.number("eps")), static_cast<float>(args.number("decay")), static_cast<float>(args.number("stepSize")),
                      static_cast<float>(args.number("rootBias2")), static_cast<float>(args.number("gradScale"))};
  const float* both = eight ? maps(args, first, stream) : nullptr;
  for (uint32_t i = 0; i < n; i++) {
    AdamSegment s;
    s.n = lists.at("values", i).numel();
    const auto get = [&](const char* key, int32_t dtype, int64_t numel) { return packed(args, lists.at(key, i), key, dtype, numel); };
    s.value = get("values", LCTX_F32, s.n).as<float>();
    s.grad = get("grads", LCTX_F32, s.n).as<float>();
    if (eight) {
      s.m8 = get("m", LCTX_U8, s.n).as<uint8_t>();
      s.v8 = get("v", LCTX_U8, s.n).as<uint8_t>();
      s.m_scale = get("mScale", LCTX_F32, divide_up(s.n, kStateBlock)).as<float>();
      s.v_scale = get("vScale", LCTX_F32, divide_up(s.n, kStateBlock)).as<float>();
    } else {
      s.m = get("m", LCTX_F32, s.n).as<float>();
      s.v = get("v", LCTX_F32, s.n).as<float>();
    }
    lctx::cuda_must(args, adamw(s, p, both, stream));
  }
}

}  // namespace lc_qlora::cuda
#endif
