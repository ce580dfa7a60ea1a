#include "chunked_ce.h"
#include "lctx/build_info.h"
#include "lctx/napi_glue.h"
#ifdef LCTX_WITH_CUDA
#include "cuda_addon.h"
#endif

namespace lctx::chunked_ce {
namespace {

const int32_t* indices(const Args& args, const char* key, int64_t rows, int64_t limit) {
  const View v = args.cpu(key, LCTX_I32);
  if (v.ndim != 1 || !v.contiguous() || v.shape[0] < rows) args.fail("ERR_LC_SHAPE", std::string(key) + ": expected i32[" + std::to_string(rows) + "], got " + v.describe());
  const int32_t* data = v.as<int32_t>();
  for (int64_t i = 0; i < rows; i++)
    if (data[i] < 0 || data[i] >= limit) args.fail("ERR_LC_OUT_OF_BOUNDS", std::string(key) + "[" + std::to_string(i) + "] is " + std::to_string(data[i]) + ", expected 0.." + std::to_string(limit - 1));
  return data;
}
View matrix(const Args& args, const char* key) {
  const View v = args.cpu(key, LCTX_F32);
  if (v.ndim != 2) args.fail("ERR_LC_SHAPE", std::string(key) + ": expected a matrix, got " + v.describe());
  return v;
}

/* Whether the op's main operand is on a GPU; an error where this build cannot serve it. */
bool on_gpu(const Args& args, const char* key) {
  if (args.tensor(key).device.device_type != kDLCUDA) return false;
#ifndef LCTX_WITH_CUDA
  args.fail("ERR_LC_NO_PREBUILD", "this build of @lc/chunked-ce has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use CPU tensors");
#endif
  return true;
}

/* crossEntropyRows({ logits [rows, vocab], labels i32 [rows], loss f32 [rows], bias?, weights?, ... }) */
void rows(const Napi::CallbackInfo& info) {
  Args args(info, "chunkedCrossEntropy");
#ifdef LCTX_WITH_CUDA
  if (on_gpu(args, "logits")) return cuda::rows(args);
#else
  on_gpu(args, "logits");
#endif
  const View logits = matrix(args, "logits"), loss = args.cpu("loss", LCTX_F32);
  const View bias = args.optional_cpu("bias", LCTX_F32), weights = args.optional_cpu("weights", LCTX_F32);
  const int64_t n = logits.shape[0], vocab = logits.shape[1];
  args.need(loss, "loss", n);
  args.need(bias, "bias", vocab);
  args.need(weights, "weights", n);
  for (const auto& [v, key] : {std::pair{loss, "loss"}, std::pair{bias, "bias"}, std::pair{weights, "weights"}})
    if (v && !v.contiguous()) args.fail("ERR_LC_STRIDES", std::string(key) + " must be contiguous");
  cross_entropy_rows({logits.as<float>(), bias ? bias.as<float>() : nullptr, indices(args, "labels", n, vocab), weights ? weights.as<float>() : nullptr,
                      loss.as<float>(), n, vocab, logits.row_stride(), static_cast<float>(args.number("logitScale")),
                      static_cast<float>(args.number("softCap")), static_cast<float>(args.number("labelSmoothing")),
                      static_cast<float>(args.number("zLoss")), static_cast<float>(args.number("inverseTokens")), args.flag("gradient")});
}

void move_rows(const Napi::CallbackInfo& info, const char* op, bool gather) {
  Args args(info, op);
#ifdef LCTX_WITH_CUDA
  if (on_gpu(args, "src")) return cuda::move(args, gather);
#else
  on_gpu(args, "src");
#endif
  const View src = matrix(args, "src"), dst = matrix(args, "dst");
  const int64_t n = gather ? dst.shape[0] : src.shape[0];
  if (src.shape[1] != dst.shape[1]) args.fail("ERR_LC_SHAPE", "src " + src.describe() + " and dst " + dst.describe() + " differ in width");
  const GatherParams p{src.as<float>(), dst.as<float>(), indices(args, "index", n, gather ? src.shape[0] : dst.shape[0]), n, src.shape[1], src.row_stride(), dst.row_stride()};
  gather ? gather_rows(p) : scatter_rows(p);
}

}  // namespace
}  // namespace lctx::chunked_ce

static Napi::Object lc_init(Napi::Env env, Napi::Object exports) {
  using namespace lctx::chunked_ce;
  exports.Set("buildInfo", lctx::build_info(env));
  exports.Set("init", Napi::Function::New(env, lctx::init));
  exports.Set("crossEntropyRows", Napi::Function::New(env, rows));
  exports.Set("gatherRows", Napi::Function::New(env, [](const Napi::CallbackInfo& info) { move_rows(info, "gatherRows", true); }));
  exports.Set("scatterRows", Napi::Function::New(env, [](const Napi::CallbackInfo& info) { move_rows(info, "scatterRows", false); }));
  return exports;
}
NODE_API_MODULE(lc_chunked_ce, lc_init)
