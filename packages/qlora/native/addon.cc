/* Unpacks arguments; the kernels are in *_cpu.cc. Sizes are checked here only for memory safety: src/ explains what is wrong. */
#include "lctx/build_info.h"
#include "lctx/napi_glue.h"
#include "lora.h"
#include "optim.h"
#include "quant.h"
#include "search.h"
#ifdef LCTX_WITH_CUDA
#include "cuda_addon.h"
#define LC_ON_CUDA(tensor, call, result)                            \
  if ((tensor).device.device_type == kDLCUDA) {                     \
    lc_qlora::cuda::call;                                           \
    return result;                                                  \
  }
#else
#define LC_ON_CUDA(tensor, call, result)                            \
  if ((tensor).device.device_type == kDLCUDA)                       \
    args.fail("ERR_LC_NO_PREBUILD", "this build of @lc/qlora has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use CPU tensors");
#endif

using lctx::Args;
using lctx::View;

namespace {

Napi::Value init(const Napi::CallbackInfo& info) {
  lctx::init(info);
  return info.Env().Undefined();
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

View packed(const Args& args, const char* key, int32_t dtype) {
  View v = args.cpu(key, dtype);
  if (!v.contiguous()) args.fail("ERR_LC_STRIDES", std::string(key) + " must be contiguous, is " + v.describe());
  return v;
}
View packed_float(const Args& args, const char* key, bool f16) {
  View v = args.tensor(key);
  if (v.dtype != LCTX_F32 && v.dtype != LCTX_BF16 && !(f16 && v.dtype == LCTX_F16))
    args.fail("ERR_LC_DTYPE", std::string(key) + (f16 ? " must be f32, bf16 or f16, is " : " must be f32 or bf16, is ") + v.describe());
  if (!v.on_cpu()) args.fail("ERR_LC_DEVICE", std::string(key) + " must be on the CPU");
  if (!v.contiguous()) args.fail("ERR_LC_STRIDES", std::string(key) + " must be contiguous, is " + v.describe());
  return v;
}
int64_t block_size(const Args& args) {
  const int64_t block = args.integer("block");
  if (block < 32 || block > lc_qlora::kMaxBlock || (block & (block - 1))) args.fail("ERR_LC_ARGUMENT", "block must be a power of two in 32..4096");
  return block;
}

Napi::Value nf4_quantize(const Napi::CallbackInfo& info) {
  Args args(info, "nf4Quantize");
  const View x = packed_float(args, "x", true), codes = packed(args, "codes", LCTX_U8), absmax = packed(args, "absmax", LCTX_F32);
  const int64_t n = x.numel(), block = block_size(args);
  args.need(codes, "codes", divide_up(n, 2));
  args.need(absmax, "absmax", divide_up(n, block));
  return Napi::Boolean::New(info.Env(), lc_qlora::nf4_quantize({x.data, x.dtype, n, block, codes.as<uint8_t>(), absmax.as<float>()}));
}

Napi::Value double_quantize(const Napi::CallbackInfo& info) {
  Args args(info, "doubleQuantize");
  const View absmax = packed(args, "absmax", LCTX_F32), codes = packed(args, "codes", LCTX_U8),
             scales = packed(args, "scales", LCTX_F32), offset = packed(args, "offset", LCTX_F32);
  const int64_t n = absmax.numel();
  args.need(codes, "codes", n);
  args.need(scales, "scales", divide_up(n, lc_qlora::kScaleBlock));
  args.need(offset, "offset", 1);
  lc_qlora::double_quantize({absmax.as<float>(), n, codes.as<uint8_t>(), scales.as<float>(), offset.as<float>()});
  return info.Env().Undefined();
}

Napi::Value nf4_dequantize(const Napi::CallbackInfo& info) {
  Args args(info, "nf4Dequantize");
  LC_ON_CUDA(args.tensor("out"), nf4_dequantize_op(args), info.Env().Undefined())
  const View codes = packed(args, "codes", LCTX_U8), out = packed_float(args, "out", false);
  const int64_t n = out.numel(), block = block_size(args), blocks = divide_up(n, block);
  args.need(codes, "codes", divide_up(n, 2));
  lc_qlora::Nf4Dequantize p{codes.as<uint8_t>(), n, block, nullptr, nullptr, nullptr, nullptr, out.data, out.dtype};
  if (const View absmax = args.optional_cpu("absmax", LCTX_F32)) {
    args.need(absmax, "absmax", blocks);
    p.absmax = absmax.as<float>();
  } else {
    const View codes2 = packed(args, "codes2", LCTX_U8), scales = packed(args, "scales", LCTX_F32), offset = packed(args, "offset", LCTX_F32);
    args.need(codes2, "codes2", blocks);
    args.need(scales, "scales", divide_up(blocks, lc_qlora::kScaleBlock));
    args.need(offset, "offset", 1);
    p.codes2 = codes2.as<uint8_t>();
    p.scales = scales.as<float>();
    p.offset = offset.as<float>();
  }
  lc_qlora::nf4_dequantize(p);
  return info.Env().Undefined();
}

lc_qlora::Mxfp4 mxfp4(const Args& args, const View& values) {
  const View blocks = packed(args, "blocks", LCTX_U8), scales = packed(args, "scales", LCTX_U8);
  const int64_t n = values.numel();
  if (n % lc_qlora::kMxBlock) args.fail("ERR_LC_SHAPE", "the number of elements must be a multiple of 32");
  args.need(blocks, "blocks", n / 2);
  args.need(scales, "scales", n / lc_qlora::kMxBlock);
  return {blocks.as<uint8_t>(), scales.as<uint8_t>(), n, values.data, values.dtype};
}
Napi::Value mxfp4_quantize(const Napi::CallbackInfo& info) {
  Args args(info, "mxfp4Quantize");
  return Napi::Boolean::New(info.Env(), lc_qlora::mxfp4_quantize(mxfp4(args, packed_float(args, "x", true))));
}
Napi::Value mxfp4_dequantize(const Napi::CallbackInfo& info) {
  Args args(info, "mxfp4Dequantize");
  LC_ON_CUDA(args.tensor("out"), mxfp4_dequantize_op(args), info.Env().Undefined())
  lc_qlora::mxfp4_dequantize(mxfp4(args, packed_float(args, "out", false)));
  return info.Env().Undefined();
}

uint64_t seed_of(const Args& args) { return static_cast<uint64_t>(args.integer("seed")); }

/* For tests. */
Napi::Value dynamic_map(const Napi::CallbackInfo& info) {
  Args args(info, "dynamicMap");
  const View out = packed(args, "out", LCTX_F32);
  args.need(out, "out", 256);
  std::memcpy(out.data, (args.flag("signed") ? lc_qlora::signed_map() : lc_qlora::unsigned_map()).values, 256 * sizeof(float));
  return info.Env().Undefined();
}

Napi::Value dropout(const Napi::CallbackInfo& info) {
  Args args(info, "dropout");
  LC_ON_CUDA(args.tensor("out"), dropout_op(args), info.Env().Undefined())
  const View x = args.cpu("x", LCTX_F32), out = args.cpu("out", LCTX_F32);
  const double p = args.number("p");
  if (!(p >= 0 && p < 1)) args.fail("ERR_LC_ARGUMENT", "p must be in [0, 1)");
  if (x.ndim != 2 || out.ndim != 2 || x.shape[0] != out.shape[0] || x.shape[1] != out.shape[1])
    args.fail("ERR_LC_SHAPE", "x " + x.describe() + " and out " + out.describe() + " must be [tokens, width]");
  lc_qlora::dropout({x.as<float>(), out.as<float>(), x.shape[0], x.shape[1], x.row_stride(), out.row_stride(), seed_of(args),
                     static_cast<uint64_t>(args.integer("start")), static_cast<uint32_t>(args.integer("site")),
                     static_cast<uint32_t>(std::floor(p * 4294967296.0)), static_cast<float>(1.0 / (1.0 - p)), args.flag("accumulate")});
  return info.Env().Undefined();
}

Napi::Value uniform(const Napi::CallbackInfo& info) {
  Args args(info, "uniform");
  const View out = packed(args, "out", LCTX_F32);
  lc_qlora::uniform({out.as<float>(), out.numel(), seed_of(args), static_cast<uint32_t>(args.integer("site")), static_cast<float>(args.number("low")),
                     static_cast<float>(args.number("high"))});
  return info.Env().Undefined();
}

template <void (*op)(const lc_qlora::ExpertB&)>
Napi::Value expert_b(const Napi::CallbackInfo& info) {
  Args args(info, "expertB");
  LC_ON_CUDA(args.tensor("grouped"), expert_b_op(args, op == lc_qlora::gather_expert_b), info.Env().Undefined())
  const View b = packed(args, "b", LCTX_F32), grouped = packed(args, "grouped", LCTX_F32);
  if (grouped.ndim != 3 || b.numel() != grouped.numel()) args.fail("ERR_LC_SHAPE", "b " + b.describe() + " and grouped " + grouped.describe());
  op({b.as<float>(), grouped.as<float>(), grouped.shape[0], grouped.shape[1], grouped.shape[2]});
  return info.Env().Undefined();
}

/* Arrays of tensors, f32 and contiguous unless said otherwise. */
class Lists {
 public:
  Lists(const Args& args, const char* op) : args_(args), op_(op) {}
  View at(const char* key, uint32_t i, int32_t dtype, int64_t numel) const {
    Napi::Value list = args_.value(key);
    if (!list.IsArray() || list.As<Napi::Array>().Length() <= i) args_.fail("ERR_LC_ARGUMENT", std::string(key) + ": expected an array of tensors");
    const std::string name = std::string(op_) + ": " + key + "[" + std::to_string(i) + "]";
    const View v = lctx::tensor(args_.env(), list.As<Napi::Array>().Get(i), name.c_str());
    if (v.dtype != dtype || !v.on_cpu() || !v.contiguous() || v.numel() != numel)
      args_.fail("ERR_LC_SHAPE", std::string(key) + "[" + std::to_string(i) + "]: expected " + std::to_string(numel) + " contiguous " +
                                     lctx::dtype_name(dtype) + " on the CPU, got " + v.describe());
    return v;
  }
  uint32_t length(const char* key) const {
    Napi::Value list = args_.value(key);
    return list.IsArray() ? list.As<Napi::Array>().Length() : 0;
  }
  bool on_cuda(const char* key) const {
    return length(key) > 0 && lctx::tensor(args_.env(), args_.value(key).As<Napi::Array>().Get(0u), key).device.device_type == kDLCUDA;
  }
  int64_t numel(const char* key, uint32_t i) const { return lctx::tensor(args_.env(), args_.value(key).As<Napi::Array>().Get(i), key).numel(); }

 private:
  const Args& args_;
  const char* op_;
};

Napi::Value grad_norm(const Napi::CallbackInfo& info) {
  Args args(info, "gradNorm");
  const Lists lists(args, "gradNorm");
#ifdef LCTX_WITH_CUDA
  if (lists.on_cuda("grads")) return Napi::Number::New(info.Env(), lc_qlora::cuda::grad_norm_op(args));
#endif
  std::vector<lc_qlora::AdamSegment> segments(lists.length("grads"));
  for (uint32_t i = 0; i < segments.size(); i++) {
    segments[i].n = lists.numel("grads", i);
    segments[i].grad = lists.at("grads", i, LCTX_F32, segments[i].n).as<float>();
  }
  return Napi::Number::New(info.Env(), lc_qlora::grad_norm(segments));
}

/* `bits` 32: lists m, v. 8: lists m, v (u8) and mScale, vScale. */
Napi::Value adamw(const Napi::CallbackInfo& info) {
  Args args(info, "adamw");
  const Lists lists(args, "adamw");
#ifdef LCTX_WITH_CUDA
  if (lists.on_cuda("values")) {
    lc_qlora::cuda::adamw_op(args);
    return info.Env().Undefined();
  }
#endif
  const bool eight = args.integer("bits") == 8;
  lc_qlora::AdamStep p;
  p.segments.resize(lists.length("values"));
  for (uint32_t i = 0; i < p.segments.size(); i++) {
    lc_qlora::AdamSegment& s = p.segments[i];
    s.n = lists.numel("values", i);
    s.value = lists.at("values", i, LCTX_F32, s.n).as<float>();
    s.grad = lists.at("grads", i, LCTX_F32, s.n).as<float>();
    if (eight) {
      s.m8 = lists.at("m", i, LCTX_U8, s.n).as<uint8_t>();
      s.v8 = lists.at("v", i, LCTX_U8, s.n).as<uint8_t>();
      s.m_scale = lists.at("mScale", i, LCTX_F32, divide_up(s.n, lc_qlora::kStateBlock)).as<float>();
      s.v_scale = lists.at("vScale", i, LCTX_F32, divide_up(s.n, lc_qlora::kStateBlock)).as<float>();
    } else {
      s.m = lists.at("m", i, LCTX_F32, s.n).as<float>();
      s.v = lists.at("v", i, LCTX_F32, s.n).as<float>();
    }
  }
  p.beta1 = static_cast<float>(args.number("beta1"));
  p.beta2 = static_cast<float>(args.number("beta2"));
  p.rest1 = static_cast<float>(1.0 - args.number("beta1"));
  p.rest2 = static_cast<float>(1.0 - args.number("beta2"));
  p.eps = static_cast<float>(args.number("eps"));
  p.decay = static_cast<float>(args.number("decay"));
  p.step_size = static_cast<float>(args.number("stepSize"));
  p.root_bias2 = static_cast<float>(args.number("rootBias2"));
  p.grad_scale = static_cast<float>(args.number("gradScale"));
  lc_qlora::adamw(p);
  return info.Env().Undefined();
}

Napi::Object setup(Napi::Env env, Napi::Object exports) {
  exports.Set("buildInfo", lctx::build_info(env));
  exports.Set("init", Napi::Function::New(env, init));
  exports.Set("nf4Quantize", Napi::Function::New(env, nf4_quantize));
  exports.Set("doubleQuantize", Napi::Function::New(env, double_quantize));
  exports.Set("nf4Dequantize", Napi::Function::New(env, nf4_dequantize));
  exports.Set("mxfp4Quantize", Napi::Function::New(env, mxfp4_quantize));
  exports.Set("mxfp4Dequantize", Napi::Function::New(env, mxfp4_dequantize));
  exports.Set("dynamicMap", Napi::Function::New(env, dynamic_map));
  exports.Set("dropout", Napi::Function::New(env, dropout));
  exports.Set("uniform", Napi::Function::New(env, uniform));
  exports.Set("gatherExpertB", Napi::Function::New(env, expert_b<lc_qlora::gather_expert_b>));
  exports.Set("scatterExpertB", Napi::Function::New(env, expert_b<lc_qlora::scatter_expert_b>));
  exports.Set("gradNorm", Napi::Function::New(env, grad_norm));
  exports.Set("adamw", Napi::Function::New(env, adamw));
  return exports;
}

}  // namespace

NODE_API_MODULE(lc_qlora, setup)
