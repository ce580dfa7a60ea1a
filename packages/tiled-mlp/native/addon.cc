#include "lctx/build_info.h"
#include "lctx/napi_glue.h"
#include "tiled_mlp.h"
#ifdef LCTX_WITH_CUDA
#include "cuda_addon.h"
#endif

namespace lctx::mlp {
namespace {

/* Ops whose main operand is on a GPU go to cuda_addon.cc. */
bool to_cuda(const Args& args, const char* key, void (*op)(const Args&)) {
  const View v = args.tensor(key);
  if (v.device.device_type != kDLCUDA) return false;
  if (!op) args.fail("ERR_LC_NO_PREBUILD", "this build of @lc/tiled-mlp has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use CPU tensors");
  op(args);
  return true;
}
#ifdef LCTX_WITH_CUDA
#define LCTX_CUDA_OP(name) cuda::name
#else
#define LCTX_CUDA_OP(name) nullptr
#endif

/* f32 on the CPU, [rows, width], rows may be strided. */
View matrix(const Args& args, const char* key) {
  View v = args.cpu(key, LCTX_F32);
  if (v.ndim != 2) args.fail("ERR_LC_SHAPE", std::string(key) + ": expected [rows, width], got " + v.describe());
  return v;
}
View optional_matrix(const Args& args, const char* key) { return args.optional(key) ? matrix(args, key) : View{}; }
void same_rows(const Args& args, const View& v, const char* key, int64_t rows, int64_t width) {
  if (v && (v.shape[0] != rows || v.shape[1] != width))
    args.fail("ERR_LC_SHAPE", std::string(key) + ": expected [" + std::to_string(rows) + "," + std::to_string(width) + "], got " + v.describe());
}
/* A packed list of `count` elements. */
View list(const Args& args, const char* key, int32_t dtype, int64_t count) {
  View v = args.cpu(key, dtype);
  if (!v.contiguous()) args.fail("ERR_LC_STRIDES", std::string(key) + ": must be contiguous, got " + v.describe());
  args.need(v, key, count);
  return v;
}

/* The kernels index with these, and JS could have changed them: every value is held against its range. */
void in_range(const Args& args, const View& v, const char* key, int64_t count, int64_t end) {
  const int32_t* values = v.as<int32_t>();
  for (int64_t i = 0; i < count; i++)
    if (values[i] < 0 || values[i] >= end)
      args.fail("ERR_LC_OUT_OF_BOUNDS", std::string(key) + "[" + std::to_string(i) + "] is " + std::to_string(values[i]) + ", must be in 0.." + std::to_string(end - 1));
}

GluParams glu_params(const Args& args, View& rows_of) {
  GluParams p{};
  const int64_t activation = args.integer("activation");
  if (activation < kSilu || activation > kGptOss) args.fail("ERR_LC_ARGUMENT", "unknown activation " + std::to_string(activation));
  p.activation = static_cast<int32_t>(activation);
  const View gate = matrix(args, "gate"), up = optional_matrix(args, "up");
  p.rows = rows_of.shape[0];
  p.width = rows_of.shape[1];
  same_rows(args, gate, "gate", p.rows, p.activation == kGptOss ? 2 * p.width : p.width);
  if (p.activation != kGptOss) {
    if (!up) args.fail("ERR_LC_ARGUMENT", "up: expected a tensor");
    same_rows(args, up, "up", p.rows, p.width);
    p.up = up.as<float>();
    p.ldup = up.row_stride();
  }
  p.gate = gate.as<float>();
  p.ldgate = gate.row_stride();
  p.limit = static_cast<float>(args.number("limit", 0));
  p.alpha = static_cast<float>(args.number("alpha", 1));
  return p;
}

/* The bias of each row's expert. */
void glu_bias(const Args& args, GluParams& p) {
  const View bias = args.optional_cpu("bias", LCTX_F32);
  if (!bias) return;
  if (bias.ndim != 2 || !bias.contiguous() || bias.shape[1] != 2 * p.width)
    args.fail("ERR_LC_SHAPE", "bias: expected contiguous [experts, " + std::to_string(2 * p.width) + "], got " + bias.describe());
  const View ids = list(args, "ids", LCTX_I32, p.rows), pair_of = list(args, "pairOf", LCTX_I32, p.rows);
  in_range(args, ids, "ids", p.rows, bias.shape[0]);
  in_range(args, pair_of, "pairOf", p.rows, p.rows);
  p.bias = bias.as<float>();
  p.bias_width = bias.shape[1];
  p.ids = ids.as<int32_t>();
  p.pair_of = pair_of.as<int32_t>();
}

void glu_op(const Napi::CallbackInfo& info) {
  Args args(info, "glu");
  if (to_cuda(args, "out", LCTX_CUDA_OP(glu_op))) return;
  View out = matrix(args, "out");
  GluParams p = glu_params(args, out);
  p.out = out.as<float>();
  p.ldout = out.row_stride();
  glu_bias(args, p);
  glu(p);
}

void glu_backward_op(const Napi::CallbackInfo& info) {
  Args args(info, "gluBackward");
  if (to_cuda(args, "dout", LCTX_CUDA_OP(glu_backward_op))) return;
  View dout = matrix(args, "dout");
  GluParams p = glu_params(args, dout);
  p.dout = dout.as<float>();
  p.lddout = dout.row_stride();
  glu_bias(args, p);
  if (args.optional("dots")) p.dots = list(args, "dots", LCTX_F32, p.rows).as<float>();
  glu_backward(p);
}

void route_op(const Napi::CallbackInfo& info) {
  Args args(info, "route");
  if (to_cuda(args, "logits", LCTX_CUDA_OP(route_op))) return;
  const View logits = matrix(args, "logits");
  RouteParams p{};
  p.logits = logits.as<float>();
  p.ldlogits = logits.row_stride();
  p.tokens = logits.shape[0];
  p.experts = logits.shape[1];
  p.top_k = args.integer("topK");
  if (p.top_k < 1 || p.top_k > p.experts) args.fail("ERR_LC_ARGUMENT", "topK must be in 1.." + std::to_string(p.experts) + ", got " + std::to_string(p.top_k));
  const int64_t pairs = p.tokens * p.top_k;
  if (pairs > INT32_MAX) args.fail("ERR_LC_ARGUMENT", "tokens x topK passes 2^31; use smaller tiles");
  p.softmax_first = args.flag("softmaxFirst");
  p.normalize = args.flag("normalize");
  p.ids = list(args, "ids", LCTX_I32, pairs).as<int32_t>();
  p.weights = list(args, "weights", LCTX_F32, pairs).as<float>();
  p.pair_of = list(args, "pairOf", LCTX_I32, pairs).as<int32_t>();
  p.row_of = list(args, "rowOf", LCTX_I32, pairs).as<int32_t>();
  p.offsets = list(args, "offsets", LCTX_I32, p.experts + 1).as<int32_t>();
  route(p);
}

void route_backward_op(const Napi::CallbackInfo& info) {
  Args args(info, "routeBackward");
  if (to_cuda(args, "dlogits", LCTX_CUDA_OP(route_backward_op))) return;
  const View dlogits = matrix(args, "dlogits"), act = optional_matrix(args, "act"), dact = optional_matrix(args, "dact"), dy = matrix(args, "dy");
  const View bias = args.optional_cpu("bias", LCTX_F32), probabilities = optional_matrix(args, "probabilities");
  RouteBackwardParams p{};
  p.tokens = dlogits.shape[0];
  p.experts = dlogits.shape[1];
  p.top_k = args.integer("topK");
  if (p.top_k < 1 || p.top_k > p.experts) args.fail("ERR_LC_ARGUMENT", "topK must be in 1.." + std::to_string(p.experts) + ", got " + std::to_string(p.top_k));
  const int64_t pairs = p.tokens * p.top_k;
  p.hidden = dy.shape[1];
  if (args.optional("dots")) {
    p.dots = list(args, "dots", LCTX_F32, pairs).as<float>();
  } else {
    if (!act || !dact) args.fail("ERR_LC_ARGUMENT", "expected dots, or act and dact");
    p.width = act.shape[1];
    same_rows(args, act, "act", pairs, p.width);
    same_rows(args, dact, "dact", pairs, p.width);
    p.act = act.as<float>();
    p.ldact = act.row_stride();
    p.dact = dact.as<float>();
    p.lddact = dact.row_stride();
  }
  same_rows(args, dy, "dy", pairs, p.hidden);
  same_rows(args, probabilities, "probabilities", p.tokens, p.experts);
  if (bias && (bias.ndim != 2 || !bias.contiguous() || bias.shape[0] != p.experts || bias.shape[1] != p.hidden))
    args.fail("ERR_LC_SHAPE", "bias: expected contiguous [experts, hidden], got " + bias.describe());
  const View ids = list(args, "ids", LCTX_I32, pairs), row_of = list(args, "rowOf", LCTX_I32, pairs);
  in_range(args, ids, "ids", pairs, p.experts);
  in_range(args, row_of, "rowOf", pairs, pairs);
  p.ids = ids.as<int32_t>();
  p.row_of = row_of.as<int32_t>();
  p.weights = list(args, "weights", LCTX_F32, pairs).as<float>();
  p.dy = dy.as<float>();
  p.lddy = dy.row_stride();
  p.bias = bias.as<float>();
  p.probabilities = probabilities.as<float>();
  p.ldprobabilities = probabilities ? probabilities.row_stride() : 0;
  p.dlogits = dlogits.as<float>();
  p.lddlogits = dlogits.row_stride();
  route_backward(p);
}

void gather_op(const Napi::CallbackInfo& info) {
  Args args(info, "gather");
  if (to_cuda(args, "out", LCTX_CUDA_OP(gather_op))) return;
  const View x = matrix(args, "x"), out = matrix(args, "out");
  GatherParams p{};
  const int64_t rows = out.shape[0];
  p.tokens = x.shape[0];
  p.width = out.shape[1];
  p.top_k = args.integer("topK");
  if (p.top_k < 1 || p.tokens * p.top_k != rows || x.shape[1] != p.width)
    args.fail("ERR_LC_SHAPE", "x " + x.describe() + " and out " + out.describe() + " do not fit topK " + std::to_string(p.top_k));
  const View row_of = list(args, "rowOf", LCTX_I32, rows);
  in_range(args, row_of, "rowOf", rows, rows);
  p.row_of = row_of.as<int32_t>();
  if (args.optional("weights")) p.weights = list(args, "weights", LCTX_F32, rows).as<float>();
  p.x = x.as<float>();
  p.ldx = x.row_stride();
  p.out = out.as<float>();
  p.ldout = out.row_stride();
  gather(p);
}

void combine_op(const Napi::CallbackInfo& info) {
  Args args(info, "combine");
  if (to_cuda(args, "out", LCTX_CUDA_OP(combine_op))) return;
  const View y = matrix(args, "y"), out = matrix(args, "out"), base = optional_matrix(args, "base");
  const View bias = args.optional_cpu("bias", LCTX_F32);
  CombineParams p{};
  p.tokens = out.shape[0];
  p.width = out.shape[1];
  p.top_k = args.integer("topK");
  const int64_t pairs = p.tokens * p.top_k;
  if (p.top_k < 1) args.fail("ERR_LC_ARGUMENT", "topK must be at least 1");
  same_rows(args, y, "y", pairs, p.width);
  same_rows(args, base, "base", p.tokens, p.width);
  const View row_of = list(args, "rowOf", LCTX_I32, pairs);
  in_range(args, row_of, "rowOf", pairs, pairs);
  p.row_of = row_of.as<int32_t>();
  if (bias) {
    if (bias.ndim != 2 || !bias.contiguous() || bias.shape[1] != p.width)
      args.fail("ERR_LC_SHAPE", "bias: expected contiguous [experts, " + std::to_string(p.width) + "], got " + bias.describe());
    const View ids = list(args, "ids", LCTX_I32, pairs);
    in_range(args, ids, "ids", pairs, bias.shape[0]);
    p.ids = ids.as<int32_t>();
    p.bias = bias.as<float>();
  }
  if (args.optional("weights")) p.weights = list(args, "weights", LCTX_F32, pairs).as<float>();
  p.y = y.as<float>();
  p.ldy = y.row_stride();
  p.base = base.as<float>();
  p.ldbase = base ? base.row_stride() : 0;
  p.out = out.as<float>();
  p.ldout = out.row_stride();
  combine(p);
}

}  // namespace

Napi::Object start(Napi::Env env, Napi::Object exports) {
  exports.Set("buildInfo", lctx::build_info(env));
  exports.Set("init", Napi::Function::New(env, init));
  exports.Set("glu", Napi::Function::New(env, glu_op));
  exports.Set("gluBackward", Napi::Function::New(env, glu_backward_op));
  exports.Set("route", Napi::Function::New(env, route_op));
  exports.Set("routeBackward", Napi::Function::New(env, route_backward_op));
  exports.Set("gather", Napi::Function::New(env, gather_op));
  exports.Set("combine", Napi::Function::New(env, combine_op));
  return exports;
}
}  // namespace lctx::mlp

static Napi::Object lc_start(Napi::Env env, Napi::Object exports) { return lctx::mlp::start(env, exports); }
NODE_API_MODULE(lc_tiled_mlp, lc_start)
