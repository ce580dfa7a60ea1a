/* N-API surface of the dense ops. TypeScript (gemm.ts, rowops.ts, copy.ts) checks shapes; here only what memory safety needs. */
#include <vector>

#include "cpu_kernels.h"
#include "lctx/napi_glue.h"
#ifdef LCTX_WITH_CUDA
#include "cuda_ops.h"
#endif

namespace lctx {
namespace {

[[noreturn]] void no_cuda(const Args& args) {
  args.fail("ERR_LC_NO_PREBUILD", "this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use CPU tensors");
}

/* Last dimension packed, first strided: a matrix whose rows may be apart. */
void matrix(const Args& args, const View& v, const char* key) {
  if (v.ndim != 2 || (v.shape[1] > 1 && v.strides[1] != 1)) args.fail("ERR_LC_STRIDES", std::string(key) + ": expected a matrix with packed columns, got " + v.describe());
}
int64_t ld(const View& v) { return v.shape[0] > 1 ? v.strides[0] : std::max<int64_t>(v.shape[1], 1); }

void gemm_op(const Napi::CallbackInfo& info) {
  Args args(info, "gemm");
  const View a = args.tensor("a"), b = args.tensor("b"), c = args.tensor("c");
  matrix(args, a, "a");
  matrix(args, b, "b");
  matrix(args, c, "c");
  const bool ta = args.flag("transA"), tb = args.flag("transB");
  const int64_t m = c.shape[0], n = c.shape[1], k = ta ? a.shape[0] : a.shape[1];
  if ((ta ? a.shape[1] : a.shape[0]) != m || (tb ? b.shape[1] : b.shape[0]) != k || (tb ? b.shape[0] : b.shape[1]) != n)
    args.fail("ERR_LC_SHAPE", "a " + a.describe() + ", b " + b.describe() + " and c " + c.describe() + " do not fit");
  const lctx_gemm_params p{sizeof p, c.device.device_type == kDLCUDA ? kDLCUDA : kDLCPU, c.device.device_id, a.dtype, b.dtype, c.dtype, ta, tb, m, n, k,
                           ld(a), ld(b), ld(c), static_cast<float>(args.number("alpha", 1)), static_cast<float>(args.number("beta", 0)),
                           a.data, b.data, c.data, nullptr, static_cast<int32_t>(args.integer("backend", 0)), 0};
  check(args.env(), api()->gemm(&p));
}

void grouped(const Napi::CallbackInfo& info, const char* op, int32_t mode) {
  Args args(info, op);
  const View a = args.tensor("a"), b = args.tensor("b"), c = args.tensor("c"), offsets = args.tensor("offsets");
  matrix(args, a, "a");
  const View& experts_of = mode == 0 ? b : c;
  const View& rows_of = mode == 0 ? c : b;
  matrix(args, rows_of, mode == 0 ? "c" : "b");
  if (experts_of.ndim != 3 || !experts_of.rows_packed()) args.fail("ERR_LC_SHAPE", "expected packed [experts, ...] matrices, got " + experts_of.describe());
  const int64_t experts = experts_of.shape[0];
  if (offsets.dtype != LCTX_I32 || offsets.ndim != 1 || offsets.shape[0] != experts + 1 || !offsets.contiguous())
    args.fail("ERR_LC_SHAPE", "offsets: expected i32[" + std::to_string(experts + 1) + "], got " + offsets.describe());
  lctx_grouped_gemm_params p{};
  p.struct_size = sizeof p;
  p.device_type = c.device.device_type == kDLCUDA ? kDLCUDA : kDLCPU;
  p.device_id = c.device.device_id;
  p.a_dtype = a.dtype;
  p.b_dtype = b.dtype;
  p.c_dtype = c.dtype;
  p.mode = mode;
  p.trans_b = args.flag("transB");
  p.experts = static_cast<int32_t>(experts);
  p.alpha = static_cast<float>(args.number("alpha", 1));
  p.beta = static_cast<float>(args.number("beta", 0));
  p.rows = a.shape[0];
  p.lda = ld(a);
  p.offsets = offsets.as<int32_t>();
  p.a = a.data;
  p.b = b.data;
  p.c = c.data;
  bool fits = rows_of.shape[0] == p.rows;
  if (mode == 0) {
    p.n = c.shape[1];
    p.k = a.shape[1];
    p.ldb = b.shape[2];
    p.ldc = ld(c);
    p.stride_b = b.shape[1] * b.shape[2];
    fits = fits && b.shape[1] == (p.trans_b ? p.n : p.k) && b.shape[2] == (p.trans_b ? p.k : p.n);
  } else {
    p.m = a.shape[1];
    p.n = b.shape[1];
    p.ldb = ld(b);
    p.ldc = c.shape[2];
    p.stride_c = c.shape[1] * c.shape[2];
    fits = fits && c.shape[1] == p.m && c.shape[2] == p.n;
  }
  if (!fits) args.fail("ERR_LC_SHAPE", "a " + a.describe() + ", b " + b.describe() + " and c " + c.describe() + " do not fit");
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
    args.fail("ERR_LC_SHAPE", "dst " + dst.describe() + " and src " + src.describe() + " must have the same shape");
  cpu::CopyParams p{strided(src), strided(dst), dst.ndim, {}};
  std::copy(dst.shape, dst.shape + LCTX_MAX_DIMS, p.shape);
  if (dst.on_cpu() && src.on_cpu()) return cpu::copy(p);
#ifdef LCTX_WITH_CUDA
  check(args.env(), cuda::copy(p, src.device, dst.device));
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
  check(args.env(), cuda::fill(p, args.number("value"), dst.device));
#else
  no_cuda(args);
#endif
}

/* [rows, width] or [rows, groups, width], f32 on the CPU. */
struct Rows {
  View v;
  int64_t rows, groups, width, ld;
};
Rows rows_of(const Args& args, View v, const char* key) {
  if (!v) return {v, 0, 0, 0, 0};
  if (v.dtype != LCTX_F32) args.fail("ERR_LC_DTYPE", std::string(key) + ": the CPU computes in f32, got " + v.describe());
  if ((v.ndim != 2 && v.ndim != 3) || !v.rows_packed()) args.fail("ERR_LC_STRIDES", std::string(key) + ": expected [rows, width] or [rows, groups, width] with packed rows, got " + v.describe());
  return {v, v.shape[0], v.ndim == 3 ? v.shape[1] : 1, v.shape[v.ndim - 1], v.row_stride()};
}
void same(const Args& args, const Rows& a, const Rows& b, const char* key) {
  if (b.v && (a.rows != b.rows || a.groups != b.groups || a.width != b.width)) args.fail("ERR_LC_SHAPE", std::string(key) + ": " + b.v.describe() + " does not match " + a.v.describe());
}
const float* vector_of(const Args& args, const char* key, int64_t width) {
  const View v = args.cpu(key, LCTX_F32);
  if (v.ndim != 1 || v.shape[0] != width || !v.contiguous()) args.fail("ERR_LC_SHAPE", std::string(key) + ": expected f32[" + std::to_string(width) + "], got " + v.describe());
  return v.as<float>();
}

#ifdef LCTX_WITH_CUDA
#define LCTX_ON_CUDA(key, call)                                       \
  if (args.tensor(key).device.device_type == kDLCUDA) {               \
    check(args.env(), call);                                          \
    return;                                                           \
  }
#else
#define LCTX_ON_CUDA(key, call) \
  if (args.tensor(key).device.device_type == kDLCUDA) no_cuda(args);
#endif

void rms_norm_op(const Napi::CallbackInfo& info) {
  Args args(info, "rmsNorm");
  LCTX_ON_CUDA("x", cuda::rms_norm(args))
  const Rows x = rows_of(args, args.tensor("x"), "x"), out = rows_of(args, args.tensor("out"), "out");
  same(args, x, out, "out");
  cpu::RmsNormParams p{};
  p.x = x.v.as<float>();
  p.weight = vector_of(args, "weight", x.width);
  p.out = out.v.as<float>();
  p.rows = x.rows;
  p.groups = x.groups;
  p.width = x.width;
  p.ldx = x.ld;
  p.ldout = out.ld;
  p.eps = static_cast<float>(args.number("eps"));
  cpu::rms_norm(p);
}
void rms_norm_backward_op(const Napi::CallbackInfo& info) {
  Args args(info, "rmsNormBackward");
  LCTX_ON_CUDA("x", cuda::rms_norm_backward(args))
  const Rows x = rows_of(args, args.tensor("x"), "x"), dout = rows_of(args, args.tensor("dout"), "dout"), dx = rows_of(args, args.tensor("dx"), "dx");
  same(args, x, dout, "dout");
  same(args, x, dx, "dx");
  const View dweight = args.optional("dWeight");
  cpu::RmsNormParams p{};
  p.x = x.v.as<float>();
  p.weight = vector_of(args, "weight", x.width);
  p.dout = dout.v.as<float>();
  p.dx = dx.v.as<float>();
  p.rows = x.rows;
  p.groups = x.groups;
  p.width = x.width;
  p.ldx = x.ld;
  p.lddout = dout.ld;
  p.lddx = dx.ld;
  p.eps = static_cast<float>(args.number("eps"));
  p.accumulate = args.flag("accumulate");
  std::vector<float> partial;
  if (dweight) {
    p.dweight = const_cast<float*>(vector_of(args, "dWeight", x.width));
    p.partials = std::clamp<int64_t>(x.rows / 64, 1, 64);
    partial.resize(static_cast<size_t>(p.partials * x.width));
    p.partial = partial.data();
  }
  cpu::rms_norm_backward(p);
}
void add_op(const Napi::CallbackInfo& info) {
  Args args(info, "add");
  LCTX_ON_CUDA("out", cuda::add(args))
  const Rows a = rows_of(args, args.tensor("a"), "a"), b = rows_of(args, args.tensor("b"), "b"), out = rows_of(args, args.tensor("out"), "out");
  same(args, out, a, "a");
  same(args, out, b, "b");
  cpu::add({a.v.as<float>(), b.v.as<float>(), out.v.as<float>(), out.rows, out.width * out.groups, a.ld, b.ld, out.ld, 1, false});
}
void add_bias_op(const Napi::CallbackInfo& info) {
  Args args(info, "addBias");
  LCTX_ON_CUDA("x", cuda::add_bias(args))
  const Rows x = rows_of(args, args.tensor("x"), "x");
  cpu::add_bias({nullptr, vector_of(args, "bias", x.width * x.groups), x.v.as<float>(), x.rows, x.width * x.groups, 0, 0, x.ld, 1, false});
}
void sum_rows_op(const Napi::CallbackInfo& info) {
  Args args(info, "sumRows");
  LCTX_ON_CUDA("x", cuda::sum_rows(args))
  const Rows x = rows_of(args, args.tensor("x"), "x");
  cpu::sum_rows({x.v.as<float>(), nullptr, const_cast<float*>(vector_of(args, "out", x.width * x.groups)), x.rows, x.width * x.groups, x.ld, 0, 0, 1, args.flag("accumulate")});
}
void scale_op(const Napi::CallbackInfo& info) {
  Args args(info, "scale");
  LCTX_ON_CUDA("x", cuda::scale(args))
  const Rows x = rows_of(args, args.tensor("x"), "x");
  cpu::scale({nullptr, nullptr, x.v.as<float>(), x.rows, x.width * x.groups, 0, 0, x.ld, static_cast<float>(args.number("factor")), false});
}
void axpy_op(const Napi::CallbackInfo& info) {
  Args args(info, "axpy");
  LCTX_ON_CUDA("y", cuda::axpy(args))
  const Rows x = rows_of(args, args.tensor("x"), "x"), y = rows_of(args, args.tensor("y"), "y");
  same(args, y, x, "x");
  cpu::axpy({x.v.as<float>(), nullptr, y.v.as<float>(), y.rows, y.width * y.groups, x.ld, 0, y.ld, static_cast<float>(args.number("alpha", 1)), false});
}

cpu::EmbeddingParams embedding(const Args& args, const View& table, const View& ids, const Rows& rows) {
  if (table.ndim != 2 || !table.rows_packed()) args.fail("ERR_LC_SHAPE", "table: expected [vocab, width], got " + table.describe());
  if (ids.dtype != LCTX_I32 || ids.ndim != 1 || !ids.contiguous()) args.fail("ERR_LC_SHAPE", "ids: expected i32[n], got " + ids.describe());
  if (rows.rows != ids.shape[0] || rows.width != table.shape[1] || rows.groups != 1) args.fail("ERR_LC_SHAPE", "rows " + rows.v.describe() + " do not match ids " + ids.describe() + " and table " + table.describe());
  const int32_t* id = ids.as<int32_t>();
  for (int64_t i = 0; i < ids.shape[0]; i++)
    if (id[i] < 0 || id[i] >= table.shape[0])
      args.fail("ERR_LC_ARGUMENT", "ids[" + std::to_string(i) + "] is " + std::to_string(id[i]) + ", the table has " + std::to_string(table.shape[0]) + " rows; does the tokenizer belong to this model?");
  cpu::EmbeddingParams p{};
  p.table = table.data;
  p.dtype = table.dtype;
  p.ids = id;
  p.n = ids.shape[0];
  p.vocab = table.shape[0];
  p.width = table.shape[1];
  p.ldtable = table.row_stride();
  p.ldout = rows.ld;
  return p;
}
void embedding_gather_op(const Napi::CallbackInfo& info) {
  Args args(info, "embeddingGather");
  LCTX_ON_CUDA("out", cuda::embedding_gather(args))
  const View table = args.tensor("table");
  if (table.dtype > LCTX_F16 || !table.on_cpu()) args.fail("ERR_LC_DTYPE", "table: expected f32, bf16 or f16 on the CPU, got " + table.describe());
  const Rows out = rows_of(args, args.tensor("out"), "out");
  cpu::EmbeddingParams p = embedding(args, table, args.tensor("ids"), out);
  p.out = out.v.as<float>();
  cpu::embedding_gather(p);
}
void embedding_scatter_add_op(const Napi::CallbackInfo& info) {
  Args args(info, "embeddingScatterAdd");
  LCTX_ON_CUDA("dTable", cuda::embedding_scatter_add(args))
  const View table = args.cpu("dTable", LCTX_F32);
  const Rows dout = rows_of(args, args.tensor("dout"), "dout");
  cpu::EmbeddingParams p = embedding(args, table, args.tensor("ids"), dout);
  p.dout = dout.v.as<float>();
  p.dtable = table.as<float>();
  cpu::embedding_scatter_add(p);
}

}  // namespace

void register_ops(Napi::Env env, Napi::Object exports) {
  auto add = [&](const char* name, void (*fn)(const Napi::CallbackInfo&)) { exports.Set(name, Napi::Function::New(env, fn, name)); };
  add("gemm", gemm_op);
  add("groupedGemm", [](const Napi::CallbackInfo& info) { grouped(info, "groupedGemm", 0); });
  add("groupedGemmWeightGrad", [](const Napi::CallbackInfo& info) { grouped(info, "groupedGemmWeightGrad", 1); });
  add("copy", copy_op);
  add("fill", fill_op);
  add("rmsNorm", rms_norm_op);
  add("rmsNormBackward", rms_norm_backward_op);
  add("add", add_op);
  add("addBias", add_bias_op);
  add("sumRows", sum_rows_op);
  add("scale", scale_op);
  add("axpy", axpy_op);
  add("embeddingGather", embedding_gather_op);
  add("embeddingScatterAdd", embedding_scatter_add_op);
}

}  // namespace lctx
