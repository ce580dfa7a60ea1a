/* Unpacks arguments. Shapes are explained to the user in src/plan.ts; what is checked here again is what memory safety rests on. */
#include "attention.h"
#include "cuda_addon.h"
#include "lctx/build_info.h"
#include "lctx/napi_glue.h"
#include "rope.h"

namespace {

using lctx::Args;
using lctx::View;

/* True when the call is for a GPU; throws where this build has no code for one. */
bool on_gpu(const Args& a, const char* key) {
  if (a.tensor(key).on_cpu()) return false;
#ifdef LCTX_WITH_CUDA
  return true;
#else
  a.fail("ERR_LC_NO_PREBUILD", std::string(key) + " is on a GPU, but this build of @lc/attention has no CUDA code; build it with LCTX_CUDA=1");
#endif
}

void require(const Args& a, bool ok, const char* what) {
  if (!ok) a.fail("ERR_LC_SHAPE", what);
}

attention::Problem problem(const Args& a, const View& q, const View& k, const View& v) {
  require(a, q.ndim == 3 && k.ndim == 3 && v.ndim == 3, "q, k and v must have 3 dimensions");
  attention::Problem p{};
  p.n = q.shape[0], p.heads = q.shape[1], p.dim = q.shape[2];
  p.kv_heads = k.shape[1];
  p.start = a.integer("start");
  p.window = a.integer("window", 0);
  p.scale = static_cast<float>(a.number("scale"));
  require(a, p.dim > 0 && p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, "heads must be a multiple of K/V heads");
  require(a, k.shape[2] == p.dim && v.shape[2] == p.dim && v.shape[1] == p.kv_heads, "k and v must be [T, kvHeads, headDim]");
  require(a, p.start >= 0 && p.start <= INT32_MAX && p.n <= INT32_MAX && p.start + p.n <= INT32_MAX, "start is out of range");
  require(a, p.start + p.n <= k.shape[0] && p.start + p.n <= v.shape[0], "start + n passes the end of k or v");
  p.q = q.as<float>(), p.k = k.as<float>(), p.v = v.as<float>();
  p.q_stride = q.row_stride(), p.k_stride = k.row_stride(), p.v_stride = v.row_stride();
  if (View sinks = a.optional_cpu("sinks", LCTX_F32)) {
    require(a, sinks.contiguous() && sinks.numel() == p.heads, "sinks must be [heads]");
    p.sinks = sinks.as<float>();
  }
  return p;
}

const int32_t* doc_start(const Args& a, int64_t n, int64_t start) {
  View docs = a.optional_cpu("docStart", LCTX_I32);
  if (!docs) return nullptr;
  require(a, docs.contiguous() && docs.numel() == n, "docStart must be [n], contiguous");
  const int64_t bad = attention::check_doc_start(docs.as<int32_t>(), n, start);
  if (bad >= 0)
    a.fail("ERR_LC_ARGUMENT", "docStart[" + std::to_string(bad) + "] is " + std::to_string(docs.as<int32_t>()[bad]) + "; expected values that do not decrease, from 0 to the token's own index start + i = " +
                                  std::to_string(start + bad) + " (the index, in the whole sequence, of the first token of its document)");
  return docs.as<int32_t>();
}

View same_rows(const Args& a, const char* key, const View& like) {
  View v = a.cpu(key, LCTX_F32);
  require(a, v.ndim == 3 && v.shape[0] == like.shape[0] && v.shape[1] == like.shape[1] && v.shape[2] == like.shape[2], "q, out, dout and dq must have one shape");
  return v;
}

View flat(const Args& a, const char* key, int64_t numel) {
  View v = a.cpu(key, LCTX_F32);
  a.need(v, key, numel);
  require(a, v.contiguous(), "lse, delta, partial and scratch must be contiguous");
  return v;
}

Napi::Value forward(const Napi::CallbackInfo& info) {
  Args a(info, "attentionForward");
#ifdef LCTX_WITH_CUDA
  if (on_gpu(a, "q")) return attention::cuda::forward(a), info.Env().Undefined();
#else
  on_gpu(a, "q");
#endif
  View q = a.cpu("q", LCTX_F32), k = a.cpu("k", LCTX_F32), v = a.cpu("v", LCTX_F32);
  attention::Forward f{};
  f.p = problem(a, q, k, v);
  f.p.doc_start = doc_start(a, f.p.n, f.p.start);
  View out = same_rows(a, "out", q);
  f.out = out.as<float>(), f.out_stride = out.row_stride();
  f.lse = flat(a, "lse", f.p.n * f.p.heads).as<float>();
  f.slots = a.integer("slots");
  require(a, f.slots >= 1 && f.slots <= 4096, "slots is out of range");
  f.scratch = flat(a, "scratch", f.slots * attention::forward_scratch(f.p.dim)).as<float>();
  attention::forward(f, lctx::api());
  return info.Env().Undefined();
}

Napi::Value backward(const Napi::CallbackInfo& info) {
  Args a(info, "attentionBackward");
#ifdef LCTX_WITH_CUDA
  if (on_gpu(a, "q")) return attention::cuda::backward(a), info.Env().Undefined();
#else
  on_gpu(a, "q");
#endif
  View q = a.cpu("q", LCTX_F32), k = a.cpu("k", LCTX_F32), v = a.cpu("v", LCTX_F32);
  attention::Backward b{};
  b.p = problem(a, q, k, v);
  b.p.doc_start = doc_start(a, b.p.n, b.p.start);
  View out = same_rows(a, "out", q), dout = same_rows(a, "dout", q), dq = same_rows(a, "dq", q);
  View dk = a.cpu("dk", LCTX_F32), dv = a.cpu("dv", LCTX_F32);
  for (const View& g : {dk, dv})
    require(a, g.ndim == 3 && g.shape[0] >= b.p.start + b.p.n && g.shape[1] == b.p.kv_heads && g.shape[2] == b.p.dim, "dk and dv must be [T, kvHeads, headDim]");
  b.out = out.as<float>(), b.out_stride = out.row_stride();
  b.dout = dout.as<float>(), b.dout_stride = dout.row_stride();
  b.dq = dq.as<float>(), b.dq_stride = dq.row_stride();
  b.dk = dk.as<float>(), b.dk_stride = dk.row_stride();
  b.dv = dv.as<float>(), b.dv_stride = dv.row_stride();
  b.lse = flat(a, "lse", b.p.n * b.p.heads).as<float>();
  if (View ds = a.optional_cpu("dSinks", LCTX_F32)) {
    require(a, b.p.sinks && ds.contiguous() && ds.numel() == b.p.heads, "dSinks must be [heads], and needs sinks");
    b.dsinks = ds.as<float>();
  }
  b.segments = a.integer("segments");
  b.slots = a.integer("slots");
  require(a, b.segments >= 1 && b.segments <= attention::kMaxSegments && b.slots >= 1 && b.slots <= 4096, "segments or slots is out of range");
  b.delta = flat(a, "delta", b.p.n * b.p.heads).as<float>();
  if (b.segments > 1) b.partial = flat(a, "partial", (b.segments - 1) * b.p.n * b.p.heads * b.p.dim).as<float>();
  b.scratch = flat(a, "scratch", b.slots * attention::backward_scratch(b.p.dim)).as<float>();
  attention::backward(b, lctx::api());
  return info.Env().Undefined();
}

Napi::Value rope(const Napi::CallbackInfo& info) {
  Args a(info, "rope");
#ifdef LCTX_WITH_CUDA
  if (on_gpu(a, "x")) return attention::cuda::rope(a), info.Env().Undefined();
#else
  on_gpu(a, "x");
#endif
  View x = a.cpu("x", LCTX_F32);
  require(a, x.ndim == 3, "x must be [n, heads, headDim]");
  Napi::Value table = a.value("invFreq");
  if (!table.IsTypedArray() || table.As<Napi::TypedArray>().TypedArrayType() != napi_float64_array)
    a.fail("ERR_LC_ARGUMENT", "rope.invFreq must be a Float64Array; make it with ropeInit");
  Napi::Float64Array inv_freq = table.As<Napi::Float64Array>();
  attention::Rope r{};
  r.n = x.shape[0], r.heads = x.shape[1], r.dim = x.shape[2];
  r.pairs = static_cast<int64_t>(inv_freq.ElementLength());
  require(a, r.pairs * 2 <= r.dim && r.pairs <= attention::kMaxPairs, "rope.rotaryDim must be at most headDim and 1024");
  r.start = a.integer("start");
  require(a, r.start >= 0, "start must not be negative");
  r.x = x.as<float>(), r.stride = x.row_stride();
  r.doc_start = doc_start(a, r.n, r.start);
  r.inv_freq = inv_freq.Data();
  r.factor = a.number("factor");
  r.transpose = a.flag("transpose");
  attention::rope(r, lctx::api());
  return info.Env().Undefined();
}

/* Floats of scratch per slot for a head dim. */
Napi::Value scratch(const Napi::CallbackInfo& info) {
  Args a(info, "attention.scratch");
  const int64_t dim = a.integer("headDim");
  require(a, dim >= 1 && dim <= (1 << 20), "headDim is out of range");
  Napi::Object out = Napi::Object::New(info.Env());
  out.Set("forward", static_cast<double>(attention::forward_scratch(dim)));
  out.Set("backward", static_cast<double>(attention::backward_scratch(dim)));
  return out;
}

/* The instruction set in use; an argument chooses one, for tests. */
Napi::Value isa(const Napi::CallbackInfo& info) {
  if (info.Length() > 0 && info[0].IsString() && !attention::use_isa(info[0].As<Napi::String>().Utf8Value().c_str())) return info.Env().Null();
  return Napi::String::New(info.Env(), attention::isa());
}

/* Whether attention on the present GPU takes Hopper's kernels; null: there is no GPU, or no code for one. */
Napi::Value hopper(const Napi::CallbackInfo& info) {
#ifdef LCTX_WITH_CUDA
  if (const int answer = attention::cuda::hopper(); answer >= 0) return Napi::Boolean::New(info.Env(), answer != 0);
#endif
  return info.Env().Null();
}

Napi::Object start(Napi::Env env, Napi::Object exports) {
  exports.Set("buildInfo", lctx::build_info(env));
  exports.Set("init", Napi::Function::New(env, [](const Napi::CallbackInfo& info) { lctx::init(info); }));
  exports.Set("forward", Napi::Function::New(env, forward));
  exports.Set("backward", Napi::Function::New(env, backward));
  exports.Set("hopper", Napi::Function::New(env, hopper));
  exports.Set("rope", Napi::Function::New(env, rope));
  exports.Set("isa", Napi::Function::New(env, isa));
  exports.Set("scratch", Napi::Function::New(env, scratch));
  return exports;
}

}  // namespace

NODE_API_MODULE(lc_attention, start)
