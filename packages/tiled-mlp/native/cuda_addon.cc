#ifdef LCTX_WITH_CUDA
#include "cuda_addon.h"

#include "cuda_kernels.h"
#include "lctx/cuda_glue.h"

namespace lctx::mlp::cuda {
namespace {

void shape(const Args& args, const View& v, const char* key, int64_t rows, int64_t width) {
  if (v && (v.ndim != 2 || v.shape[0] != rows || v.shape[1] != width))
    args.fail("ERR_LC_SHAPE", std::string(key) + ": expected [" + std::to_string(rows) + "," + std::to_string(width) + "], got " + v.describe());
}
template <class T>
T* list(const Args& args, const char* key, int32_t dtype, int64_t count, const View& like) {
  const View v = args.tensor(key);
  if (v.dtype != dtype || !v.contiguous() || !on_cuda(v) || v.device.device_id != like.device.device_id || v.numel() < count)
    args.fail("ERR_LC_SHAPE", std::string(key) + ": expected " + std::to_string(count) + " " + dtype_name(dtype) + " on the GPU, got " + v.describe());
  return v.as<T>();
}
int64_t top_k(const Args& args) {
  const int64_t k = args.integer("topK");
  if (k < 1 || k > 32) args.fail("ERR_LC_ARGUMENT", "topK must be in 1..32 on cuda, got " + std::to_string(k));
  return k;
}

Glu glu_params(const Args& args, const View& rows) {
  Glu p{};
  p.activation = static_cast<int32_t>(args.integer("activation"));
  if (p.activation < kSilu || p.activation > kGptOss) args.fail("ERR_LC_ARGUMENT", "unknown activation " + std::to_string(p.activation));
  if (rows.ndim != 2) args.fail("ERR_LC_SHAPE", "expected [rows, width], got " + rows.describe());
  p.rows = rows.shape[0];
  p.width = rows.shape[1];
  const View gate = args.tensor("gate"), up = args.optional("up");
  shape(args, gate, "gate", p.rows, p.activation == kGptOss ? 2 * p.width : p.width);
  if (p.activation != kGptOss && !up) args.fail("ERR_LC_ARGUMENT", "up: expected a tensor");
  shape(args, up, "up", p.rows, p.width);
  p.gate = device_rows(args, gate, "gate", rows);
  p.up = device_rows(args, up, "up", rows);
  p.limit = static_cast<float>(args.number("limit", 0));
  p.alpha = static_cast<float>(args.number("alpha", 1));
  return p;
}

/* The bias of each row's expert. */
void glu_bias(const Args& args, Glu& p, const View& rows) {
  const View bias = args.optional("bias");
  if (!bias) return;
  if (bias.ndim != 2 || bias.shape[1] != 2 * p.width) args.fail("ERR_LC_SHAPE", "bias: expected [experts, " + std::to_string(2 * p.width) + "], got " + bias.describe());
  p.bias = device_rows(args, bias, "bias", rows);
  p.ids = list<int32_t>(args, "ids", LCTX_I32, p.rows, rows);
  p.pair_of = list<int32_t>(args, "pairOf", LCTX_I32, p.rows, rows);
}

}  // namespace

void glu_op(const Args& args) {
  const View out = args.tensor("out");
  Glu p = glu_params(args, out);
  p.out = device_rows(args, out, "out", out);
  p.keep = !args.flag("forwardOnly");
  glu_bias(args, p, out);
  cuda_must(args, glu(p, cuda_stream(args, out)));
}
void glu_backward_op(const Args& args) {
  const View dout = args.tensor("dout");
  Glu p = glu_params(args, dout);
  p.dout = device_rows(args, dout, "dout", dout);
  glu_bias(args, p, dout);
  if (p.bias.data && !args.optional("dots")) args.fail("ERR_LC_ARGUMENT", "bias: goes with dots alone");
  if (args.optional("dots")) p.dots = list<float>(args, "dots", LCTX_F32, p.rows, dout);
  cuda_must(args, glu_backward(p, cuda_stream(args, dout)));
}
void route_op(const Args& args) {
  const View logits = args.tensor("logits");
  if (logits.ndim != 2 || logits.dtype != LCTX_F32 || !logits.rows_packed()) args.fail("ERR_LC_DTYPE", "logits: expected f32 [tokens, experts], got " + logits.describe());
  RouteParams p{};
  p.logits = logits.as<float>();
  p.ldlogits = logits.row_stride();
  p.tokens = logits.shape[0];
  p.experts = logits.shape[1];
  p.top_k = top_k(args);
  if (p.top_k > p.experts || p.tokens * p.top_k > INT32_MAX) args.fail("ERR_LC_ARGUMENT", "topK is larger than the number of experts, or tokens x topK passes 2^31");
  const int64_t pairs = p.tokens * p.top_k;
  p.softmax_first = args.flag("softmaxFirst");
  p.normalize = args.flag("normalize");
  p.ids = list<int32_t>(args, "ids", LCTX_I32, pairs, logits);
  p.weights = list<float>(args, "weights", LCTX_F32, pairs, logits);
  p.pair_of = list<int32_t>(args, "pairOf", LCTX_I32, pairs, logits);
  p.row_of = list<int32_t>(args, "rowOf", LCTX_I32, pairs, logits);
  p.offsets = list<int32_t>(args, "offsets", LCTX_I32, p.experts + 1, logits);
  cuda_must(args, route(p, cuda_stream(args, logits)));
}
void route_backward_op(const Args& args) {
  const View dlogits = args.tensor("dlogits"), act = args.optional("act"), dact = args.optional("dact"), dy = args.tensor("dy");
  const View bias = args.optional("bias"), probabilities = args.optional("probabilities"), dots = args.optional("dots");
  if (!dots && (!act || !dact)) args.fail("ERR_LC_ARGUMENT", "expected dots, or act and dact");
  if (dlogits.ndim != 2 || dy.ndim != 2 || (!dots && act.ndim != 2)) args.fail("ERR_LC_SHAPE", "expected matrices");
  RouteBackward p{};
  p.tokens = dlogits.shape[0];
  p.experts = dlogits.shape[1];
  p.top_k = top_k(args);
  p.hidden = dy.shape[1];
  const int64_t pairs = p.tokens * p.top_k;
  if (dots) {
    p.dots = list<float>(args, "dots", LCTX_F32, pairs, dlogits);
  } else {
    p.width = act.shape[1];
    shape(args, act, "act", pairs, p.width);
    shape(args, dact, "dact", pairs, p.width);
    p.act = device_rows(args, act, "act", dlogits);
    p.dact = device_rows(args, dact, "dact", dlogits);
  }
  shape(args, dy, "dy", pairs, p.hidden);
  shape(args, bias, "bias", p.experts, p.hidden);
  shape(args, probabilities, "probabilities", p.tokens, p.experts);
  p.dy = device_rows(args, dy, "dy", dlogits);
  p.bias = device_rows(args, bias, "bias", dlogits);
  p.probabilities = device_rows(args, probabilities, "probabilities", dlogits);
  p.dlogits = device_rows(args, dlogits, "dlogits", dlogits);
  p.weights = list<float>(args, "weights", LCTX_F32, pairs, dlogits);
  p.ids = list<int32_t>(args, "ids", LCTX_I32, pairs, dlogits);
  p.row_of = list<int32_t>(args, "rowOf", LCTX_I32, pairs, dlogits);
  cuda_must(args, route_backward(p, cuda_stream(args, dlogits)));
}
void gather_op(const Args& args) {
  const View x = args.tensor("x"), out = args.tensor("out");
  Gather p{};
  p.top_k = top_k(args);
  if (out.ndim != 2 || x.ndim != 2 || x.shape[0] * p.top_k != out.shape[0] || x.shape[1] != out.shape[1])
    args.fail("ERR_LC_SHAPE", "x " + x.describe() + " and out " + out.describe() + " do not fit topK " + std::to_string(p.top_k));
  p.tokens = x.shape[0];
  p.width = out.shape[1];
  p.x = device_rows(args, x, "x", out);
  p.out = device_rows(args, out, "out", out);
  p.row_of = list<int32_t>(args, "rowOf", LCTX_I32, p.tokens * p.top_k, out);
  if (args.optional("weights")) p.weights = list<float>(args, "weights", LCTX_F32, p.tokens * p.top_k, out);
  cuda_must(args, gather(p, cuda_stream(args, out)));
}
void combine_op(const Args& args) {
  const View y = args.tensor("y"), out = args.tensor("out"), base = args.optional("base"), bias = args.optional("bias");
  if (out.ndim != 2) args.fail("ERR_LC_SHAPE", "out: expected [tokens, width], got " + out.describe());
  Combine p{};
  p.tokens = out.shape[0];
  p.width = out.shape[1];
  p.top_k = top_k(args);
  const int64_t pairs = p.tokens * p.top_k;
  shape(args, y, "y", pairs, p.width);
  shape(args, base, "base", p.tokens, p.width);
  if (bias && (bias.ndim != 2 || bias.shape[1] != p.width)) args.fail("ERR_LC_SHAPE", "bias: expected [experts, " + std::to_string(p.width) + "], got " + bias.describe());
  p.y = device_rows(args, y, "y", out);
  p.base = device_rows(args, base, "base", out);
  p.bias = device_rows(args, bias, "bias", out);
  p.out = device_rows(args, out, "out", out);
  p.row_of = list<int32_t>(args, "rowOf", LCTX_I32, pairs, out);
  if (bias) p.ids = list<int32_t>(args, "ids", LCTX_I32, pairs, out);
  if (args.optional("weights")) p.weights = list<float>(args, "weights", LCTX_F32, pairs, out);
  cuda_must(args, combine(p, cuda_stream(args, out)));
}

}  // namespace lctx::mlp::cuda
#endif
