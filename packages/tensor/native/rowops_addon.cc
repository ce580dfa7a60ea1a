/* N-API surface of the row ops and embeddings. */
#include "cpu_kernels.h"
#include "ops_checks.h"
#ifdef LCTX_WITH_CUDA
#include "cuda_ops.h"
#endif

namespace lctx {
namespace {

/* [width], [rows, width] or [rows, groups.., width], f32 on the CPU; rows may be apart. */
struct Rows {
  View v;
  int64_t rows, groups, width, ld;
  float* data() const { return v.as<float>(); }
  int64_t row() const { return groups * width; }
};
Rows rows_of(const Args& args, const char* key) {
  const View v = args.tensor(key);
  if (!v.on_cpu()) args.fail("ERR_LC_DEVICE", std::string(key) + ": expected a CPU tensor as the others, got one on " + device_name(v) + "; copy() it");
  if (v.dtype != LCTX_F32) args.fail("ERR_LC_DTYPE", std::string(key) + ": the CPU computes in f32, got " + v.describe() + "; copy() it to an f32 tensor");
  if (v.ndim == 0) args.fail("ERR_LC_SHAPE", std::string(key) + ": expected [rows, width], got a scalar");
  if (!v.rows_packed() || (v.ndim == 1 && !v.contiguous()))
    args.fail("ERR_LC_STRIDES", std::string(key) + ": only the first dimension may be strided, got " + v.describe() + "; copy() it to a contiguous tensor");
  if (v.ndim == 1) return {v, 1, 1, v.shape[0], v.shape[0]};
  int64_t groups = 1;
  for (int i = 1; i < v.ndim - 1; i++) groups *= v.shape[i];
  return {v, v.shape[0], groups, v.shape[v.ndim - 1], v.row_stride()};
}
void same_shape(const Args& args, const Rows& a, const char* a_key, const Rows& b, const char* b_key) {
  if (a.rows != b.rows || a.groups != b.groups || a.width != b.width)
    args.fail("ERR_LC_SHAPE", std::string(b_key) + ": expected the shape of " + a_key + " " + a.v.describe() + ", got " + b.v.describe());
}
View vector_of(const Args& args, const char* key, int64_t width) {
  const View v = args.cpu(key, LCTX_F32);
  if (v.ndim != 1 || v.shape[0] != width || !v.contiguous())
    args.fail("ERR_LC_SHAPE", std::string(key) + ": expected f32[" + std::to_string(width) + "], got " + v.describe());
  return v;
}

#ifdef LCTX_WITH_CUDA
#define LCTX_ON_CUDA(key, call)                         \
  if (args.tensor(key).device.device_type == kDLCUDA) { \
    check(args.env(), call);                            \
    return;                                             \
  }
#else
#define LCTX_ON_CUDA(key, call) \
  if (args.tensor(key).device.device_type == kDLCUDA) no_cuda(args);
#endif

void rms_norm_op(const Napi::CallbackInfo& info) {
  Args args(info, "rmsNorm");
  LCTX_ON_CUDA("x", cuda::rms_norm(args))
  const Rows x = rows_of(args, "x"), out = rows_of(args, "out");
  same_shape(args, x, "x", out, "out");
  const View weight = vector_of(args, "weight", x.width);
  writable(args, {"out", out.v});
  apart(args, {"out", out.v}, {"x", x.v}, true);
  apart(args, {"out", out.v}, {"weight", weight}, false);
  cpu::RmsNormParams p{};
  p.x = x.data();
  p.weight = weight.as<float>();
  p.out = out.data();
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
  const Rows x = rows_of(args, "x"), dout = rows_of(args, "dout"), dx = rows_of(args, "dx");
  same_shape(args, x, "x", dout, "dout");
  same_shape(args, x, "x", dx, "dx");
  const View weight = vector_of(args, "weight", x.width);
  const View dweight = args.optional("dWeight") ? vector_of(args, "dWeight", x.width) : View{};
  writable(args, {"dx", dx.v});
  apart(args, {"dx", dx.v}, {"x", x.v}, true);
  apart(args, {"dx", dx.v}, {"dout", dout.v}, true);
  apart(args, {"dx", dx.v}, {"weight", weight}, false);
  for (const Named& other : {Named{"x", x.v}, Named{"dout", dout.v}, Named{"dx", dx.v}, Named{"weight", weight}}) apart(args, {"dWeight", dweight}, other, false);
  cpu::RmsNormParams p{};
  p.x = x.data();
  p.weight = weight.as<float>();
  p.dout = dout.data();
  p.dx = dx.data();
  p.dweight = dweight ? dweight.as<float>() : nullptr;
  p.rows = x.rows;
  p.groups = x.groups;
  p.width = x.width;
  p.ldx = x.ld;
  p.lddout = dout.ld;
  p.lddx = dx.ld;
  p.eps = static_cast<float>(args.number("eps"));
  p.accumulate = args.flag("accumulate");
  cpu::rms_norm_backward(p);
}
void add_op(const Napi::CallbackInfo& info) {
  Args args(info, "add");
  LCTX_ON_CUDA("out", cuda::add(args))
  const Rows a = rows_of(args, "a"), b = rows_of(args, "b"), out = rows_of(args, "out");
  same_shape(args, out, "out", a, "a");
  same_shape(args, out, "out", b, "b");
  writable(args, {"out", out.v});
  apart(args, {"out", out.v}, {"a", a.v}, true);
  apart(args, {"out", out.v}, {"b", b.v}, true);
  cpu::add({a.data(), b.data(), out.data(), out.rows, out.row(), a.ld, b.ld, out.ld, 1, false});
}
void add_bias_op(const Napi::CallbackInfo& info) {
  Args args(info, "addBias");
  LCTX_ON_CUDA("x", cuda::add_bias(args))
  const Rows x = rows_of(args, "x");
  const View bias = vector_of(args, "bias", x.row());
  writable(args, {"x", x.v});
  apart(args, {"x", x.v}, {"bias", bias}, false);
  cpu::add_bias({nullptr, bias.as<float>(), x.data(), x.rows, x.row(), 0, 0, x.ld, 1, false});
}
void sum_rows_op(const Napi::CallbackInfo& info) {
  Args args(info, "sumRows");
  LCTX_ON_CUDA("x", cuda::sum_rows(args))
  const Rows x = rows_of(args, "x");
  const View out = vector_of(args, "out", x.row());
  apart(args, {"out", out}, {"x", x.v}, false);
  cpu::sum_rows({x.data(), nullptr, out.as<float>(), x.rows, x.row(), x.ld, 0, 0, 1, args.flag("accumulate")});
}
void scale_op(const Napi::CallbackInfo& info) {
  Args args(info, "scale");
  LCTX_ON_CUDA("x", cuda::scale(args))
  const Rows x = rows_of(args, "x");
  writable(args, {"x", x.v});
  cpu::scale({nullptr, nullptr, x.data(), x.rows, x.row(), 0, 0, x.ld, static_cast<float>(args.number("factor")), false});
}
void axpy_op(const Napi::CallbackInfo& info) {
  Args args(info, "axpy");
  LCTX_ON_CUDA("y", cuda::axpy(args))
  const Rows x = rows_of(args, "x"), y = rows_of(args, "y");
  same_shape(args, y, "y", x, "x");
  writable(args, {"y", y.v});
  apart(args, {"y", y.v}, {"x", x.v}, true);
  cpu::axpy({x.data(), nullptr, y.data(), y.rows, y.row(), x.ld, 0, y.ld, static_cast<float>(args.number("alpha", 1)), false});
}

/* rows [n, width] beside ids [n] and a table [vocab, width]. */
cpu::EmbeddingParams embedding(const Args& args, const View& table, const char* table_key, const Rows& rows, const char* rows_key) {
  const View ids = args.tensor("ids");
  if (table.ndim != 2 || !table.rows_packed()) args.fail("ERR_LC_SHAPE", std::string(table_key) + ": expected [vocab, width], got " + table.describe());
  if (ids.dtype != LCTX_I32 || ids.ndim != 1 || !ids.contiguous() || !ids.on_cpu()) args.fail("ERR_LC_SHAPE", "ids: expected i32[n] on the CPU, got " + ids.describe() + " on " + device_name(ids));
  expect_shape(args, {rows_key, rows.v}, {ids.shape[0], table.shape[1]}, {{"ids", ids}, {table_key, table}});
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
  if (!table.on_cpu()) args.fail("ERR_LC_DEVICE", "table is on " + device_name(table) + " but out is on the CPU; copy() one of them");
  if (table.dtype > LCTX_F16) args.fail("ERR_LC_DTYPE", "table: expected f32, bf16 or f16, got " + table.describe());
  const Rows out = rows_of(args, "out");
  cpu::EmbeddingParams p = embedding(args, table, "table", out, "out");
  writable(args, {"out", out.v});
  apart(args, {"out", out.v}, {"table", table}, false);
  p.out = out.data();
  cpu::embedding_gather(p);
}
void embedding_scatter_add_op(const Napi::CallbackInfo& info) {
  Args args(info, "embeddingScatterAdd");
  LCTX_ON_CUDA("dTable", cuda::embedding_scatter_add(args))
  const View table = args.cpu("dTable", LCTX_F32);
  const Rows dout = rows_of(args, "dout");
  cpu::EmbeddingParams p = embedding(args, table, "dTable", dout, "dout");
  writable(args, {"dTable", table});
  apart(args, {"dTable", table}, {"dout", dout.v}, false);
  p.dout = dout.data();
  p.dtable = table.as<float>();
  cpu::embedding_scatter_add(p);
}

}  // namespace

void register_row_ops(Napi::Env env, Napi::Object exports) {
  auto add = [&](const char* name, void (*fn)(const Napi::CallbackInfo&)) { exports.Set(name, Napi::Function::New(env, fn, name)); };
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
