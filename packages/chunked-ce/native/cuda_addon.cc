#ifdef LCTX_WITH_CUDA
#include "cuda_addon.h"

#include "cuda_kernels.h"
#include "lctx/cuda_glue.h"

namespace lctx::chunked_ce::cuda {
namespace {

template <class T>
T* list(const Args& args, const char* key, int32_t dtype, int64_t count, const View& like) {
  const View v = args.optional(key);
  if (!v) return nullptr;
  if (v.dtype != dtype || !v.contiguous() || !on_cuda(v) || v.device.device_id != like.device.device_id || v.numel() < count)
    args.fail("ERR_LC_SHAPE", std::string(key) + ": expected " + std::to_string(count) + " " + dtype_name(dtype) + " on the GPU, got " + v.describe());
  return v.as<T>();
}

}  // namespace

void rows(const Args& args) {
  const View logits = args.tensor("logits");
  if (logits.ndim != 2 || logits.dtype != LCTX_F32 || !logits.rows_packed()) args.fail("ERR_LC_DTYPE", "logits: expected f32 [rows, vocab], got " + logits.describe());
  Rows p{};
  p.rows = logits.shape[0];
  p.vocab = logits.shape[1];
  p.ld = logits.row_stride();
  p.logits = logits.as<float>();
  const View bias = args.optional("bias");
  p.bias = device_rows(args, bias, "bias", logits);
  if (bias) args.need(bias, "bias", p.vocab);
  p.labels = list<int32_t>(args, "labels", LCTX_I32, p.rows, logits);
  p.weights = list<float>(args, "weights", LCTX_F32, p.rows, logits);
  p.loss = list<float>(args, "loss", LCTX_F32, p.rows, logits);
  if (!p.labels || !p.loss) args.fail("ERR_LC_ARGUMENT", "labels and loss are required");
  p.logit_scale = static_cast<float>(args.number("logitScale"));
  p.soft_cap = static_cast<float>(args.number("softCap"));
  p.label_smoothing = static_cast<float>(args.number("labelSmoothing"));
  p.z_loss = static_cast<float>(args.number("zLoss"));
  p.inverse_tokens = static_cast<float>(args.number("inverseTokens"));
  p.gradient = args.flag("gradient");
  const cudaStream_t stream = cuda_stream(args, logits);
  cuda_must(args, cross_entropy_rows(p, stream));
  if (float* sum = list<float>(args, "sum", LCTX_F32, 2, logits)) cuda_must(args, add_losses(p.loss, p.rows, sum, stream));
}

void move(const Args& args, bool gather) {
  const View src = args.tensor("src"), dst = args.tensor("dst");
  if (src.ndim != 2 || dst.ndim != 2 || src.shape[1] != dst.shape[1] || src.dtype != dst.dtype || !src.rows_packed() || !dst.rows_packed() || !on_cuda(src) || !on_cuda(dst))
    args.fail("ERR_LC_SHAPE", "src " + src.describe() + " and dst " + dst.describe() + " differ in width, dtype or device");
  const int64_t item = static_cast<int64_t>(item_size(src.dtype)), n = gather ? dst.shape[0] : src.shape[0];
  const Move p{src.data, dst.data, list<int32_t>(args, "index", LCTX_I32, n, src), n, src.shape[1] * item, src.row_stride() * item, dst.row_stride() * item, gather};
  if (!p.index || item < 2) args.fail("ERR_LC_ARGUMENT", "index is required, and rows of 16 bits or more");
  cuda_must(args, move_rows(p, cuda_stream(args, src)));
}

}  // namespace lctx::chunked_ce::cuda
#endif
