/* N-API surface of GEMM, copies and fills; rowops_addon.cc has the row ops. */
#include <algorithm>

#include "cpu_kernels.h"
#include "ops_checks.h"
#ifdef LCTX_WITH_CUDA
#include "cuda_ops.h"
#include "cuda_rt.h"
#endif

namespace lctx {
namespace {

void* gpu_stream(const Args& args) {
#ifdef LCTX_WITH_CUDA
  return cuda::stream_arg(args);
#else
  (void)args;
  return nullptr;
#endif
}

/* Columns packed; rows may be apart. */
void matrix(const Args& args, const Named& n) {
  const View& v = n.view;
  if (v.ndim != 2) args.fail("ERR_LC_SHAPE", std::string(n.key) + ": expected a matrix, got " + v.describe());
  if (v.shape[1] > 1 && v.strides[1] != 1) args.fail("ERR_LC_STRIDES", std::string(n.key) + ": columns of " + v.describe() + " are not adjacent; copy() it to a contiguous tensor, or use transA/transB");
}
/* Elements between rows; a matrix of one row has none, whatever its stride says. */
int64_t ld(const View& v) { return v.shape[0] > 1 ? v.strides[0] : std::max<int64_t>(v.shape[1], 1); }

void gemm_op(const Napi::CallbackInfo& info) {
  Args args(info, "gemm");
  const View a = args.tensor("a"), b = args.tensor("b"), c = args.tensor("c");
  one_device(args, {{"a", a}, {"b", b}, {"c", c}});
  matrix(args, {"a", a});
  matrix(args, {"b", b});
  matrix(args, {"c", c});
  const bool ta = args.flag("transA"), tb = args.flag("transB");
  const int64_t m = a.shape[ta ? 1 : 0], k = a.shape[ta ? 0 : 1], n = b.shape[tb ? 0 : 1];
  if (tb) expect_shape(args, {"b", b}, {n, k}, {{"a", a}});
  else expect_shape(args, {"b", b}, {k, n}, {{"a", a}});
  expect_shape(args, {"c", c}, {m, n}, {{"a", a}, {"b", b}});
  writable(args, {"c", c});
  apart(args, {"c", c}, {"a", a}, false);
  apart(args, {"c", c}, {"b", b}, false);
  const lctx_gemm_params p{sizeof p, c.device.device_type == kDLCUDA ? kDLCUDA : kDLCPU, c.device.device_id, a.dtype, b.dtype, c.dtype, ta, tb, m, n, k,
                           ld(a), ld(b), ld(c), static_cast<float>(args.number("alpha", 1)), static_cast<float>(args.number("beta", 0)),
                           a.data, b.data, c.data, gpu_stream(args), static_cast<int32_t>(args.integer("backend", 0)), 0};
  const View bias = args.optional("bias");
  if (!bias) {
    check(args.env(), api()->gemm(&p));
    return;
  }
  one_device(args, {{"c", c}, {"bias", bias}});
  expect_shape(args, {"bias", bias}, {n}, {{"c", c}});
  if (!bias.contiguous()) args.fail("ERR_LC_STRIDES", "bias: must be contiguous, got " + bias.describe());
  if (bias.dtype != c.dtype && bias.dtype != LCTX_F32) args.fail("ERR_LC_DTYPE", "bias: expected f32 or c's dtype, got " + bias.describe());
  apart(args, {"c", c}, {"bias", bias}, false);
#ifdef LCTX_WITH_CUDA
  if (p.device_type == kDLCUDA) {
    check(args.env(), cuda::gemm_with_bias(&p, bias.data, bias.dtype));
    return;
  }
#endif
  check(args.env(), api()->gemm(&p));
  cpu::add_bias({nullptr, bias.as<float>(), c.as<float>(), m, n, 0, 0, p.ldc, 1, false});
}

/* [experts, rows, columns] with packed columns; rows and experts may be apart. */
void experts_of(const Args& args, const Named& n, int64_t* between_rows, int64_t* between_experts) {
  const View& v = n.view;
  if (v.ndim != 3) args.fail("ERR_LC_SHAPE", std::string(n.key) + ": expected one matrix per expert, got " + v.describe());
  if (v.shape[2] > 1 && v.strides[2] != 1) args.fail("ERR_LC_STRIDES", std::string(n.key) + ": columns of " + v.describe() + " are not adjacent; copy() it to a contiguous tensor");
  *between_rows = v.shape[1] > 1 ? v.strides[1] : std::max<int64_t>(v.shape[2], 1);
  *between_experts = v.shape[0] > 1 ? v.strides[0] : 0;
}

void grouped(const Napi::CallbackInfo& info, const char* op, int32_t mode) {
  Args args(info, op);
  const View a = args.tensor("a"), b = args.tensor("b"), c = args.tensor("c"), offsets = args.tensor("offsets");
  one_device(args, {{"a", a}, {"b", b}, {"c", c}, {"offsets", offsets}});
  lctx_grouped_gemm_params p{};
  p.struct_size = sizeof p;
  p.device_type = c.device.device_type == kDLCUDA ? kDLCUDA : kDLCPU;
  p.device_id = c.device.device_id;
  p.a_dtype = a.dtype;
  p.b_dtype = b.dtype;
  p.c_dtype = c.dtype;
  p.mode = mode;
  p.trans_b = mode == 0 && args.flag("transB");
  p.alpha = static_cast<float>(args.number("alpha", 1));
  p.beta = static_cast<float>(args.number("beta", 0));
  matrix(args, {"a", a});
  p.rows = a.shape[0];
  p.lda = ld(a);
  const View& per_expert = mode == 0 ? b : c;
  const int64_t experts = per_expert.ndim > 0 ? per_expert.shape[0] : 0;
  if (mode == 0) {
    experts_of(args, {"b", b}, &p.ldb, &p.stride_b);
    matrix(args, {"c", c});
    p.k = a.shape[1];
    p.n = c.shape[1];
    p.ldc = ld(c);
    if (p.trans_b) expect_shape(args, {"b", b}, {experts, p.n, p.k}, {{"a", a}, {"c", c}});
    else expect_shape(args, {"b", b}, {experts, p.k, p.n}, {{"a", a}, {"c", c}});
    expect_shape(args, {"c", c}, {p.rows, p.n}, {{"a", a}});
  } else {
    experts_of(args, {"c", c}, &p.ldc, &p.stride_c);
    matrix(args, {"b", b});
    p.m = a.shape[1];
    p.n = b.shape[1];
    p.ldb = ld(b);
    expect_shape(args, {"b", b}, {p.rows, p.n}, {{"a", a}});
    expect_shape(args, {"c", c}, {experts, p.m, p.n}, {{"a", a}, {"b", b}});
  }
  p.experts = static_cast<int32_t>(experts);
  if (offsets.dtype != LCTX_I32 || offsets.ndim != 1 || offsets.shape[0] != experts + 1 || !offsets.contiguous())
    args.fail("ERR_LC_SHAPE", "offsets: expected i32[" + std::to_string(experts + 1) + "] (experts + 1), got " + offsets.describe());
  writable(args, {"c", c});
  for (const Named& in : {Named{"a", a}, Named{"b", b}, Named{"offsets", offsets}}) apart(args, {"c", c}, in, false);
  p.stream = gpu_stream(args);
  p.offsets = offsets.as<int32_t>();
  p.a = a.data;
  p.b = b.data;
  p.c = c.data;
  check(args.env(), api()->grouped_gemm(&p));
}

cpu::StridedArg strided(const View& v) {
  cpu::StridedArg s{v.data, v.dtype, {}};
  std::copy(v.strides, v.strides + LCTX_MAX_DIMS, s.strides);
  return s;
}
void copy_op(const Napi::CallbackInfo& info) {
  Args args(info, "copy");
  const View dst = args.tensor("dst"), src = args.tensor("src");
  if (dst.ndim != src.ndim || !std::equal(dst.shape, dst.shape + dst.ndim, src.shape))
    args.fail("ERR_LC_SHAPE", "dst " + dst.describe() + " and src " + src.describe() + " must have the same shape; use view()");
  writable(args, {"dst", dst});
  if (identical(dst, src)) return;
  apart(args, {"dst", dst}, {"src", src}, false);
  cpu::CopyParams p{strided(src), strided(dst), dst.ndim, {}};
  std::copy(dst.shape, dst.shape + LCTX_MAX_DIMS, p.shape);
  if (dst.on_cpu() && src.on_cpu()) return cpu::copy(p);
#ifdef LCTX_WITH_CUDA
  check(args.env(), cuda::copy(p, src.device, dst.device, cuda::stream_arg(args)));
#else
  no_cuda(args);
#endif
}
void fill_op(const Napi::CallbackInfo& info) {
  Args args(info, "fill");
  const View dst = args.tensor("dst");
  cpu::CopyParams p{{}, strided(dst), dst.ndim, {}};
  std::copy(dst.shape, dst.shape + LCTX_MAX_DIMS, p.shape);
  if (dst.on_cpu()) return cpu::fill(p, args.number("value"));
#ifdef LCTX_WITH_CUDA
  check(args.env(), cuda::fill(p, args.number("value"), dst.device, cuda::stream_arg(args)));
#else
  no_cuda(args);
#endif
}

}  // namespace

void register_row_ops(Napi::Env env, Napi::Object exports);

void register_ops(Napi::Env env, Napi::Object exports) {
  auto add = [&](const char* name, void (*fn)(const Napi::CallbackInfo&)) { exports.Set(name, Napi::Function::New(env, fn, name)); };
  add("gemm", gemm_op);
  add("groupedGemm", [](const Napi::CallbackInfo& info) { grouped(info, "groupedGemm", 0); });
  add("groupedGemmWeightGrad", [](const Napi::CallbackInfo& info) { grouped(info, "groupedGemmWeightGrad", 1); });
  add("copy", copy_op);
  add("fill", fill_op);
  register_row_ops(env, exports);
}

}  // namespace lctx
