/* Launchers of the CUDA kernels: cross-entropy over one chunk of logits, and rows moved by index. They return a cudaError_t as int. */
#ifndef LCTX_CHUNKED_CE_CUDA_H
#define LCTX_CHUNKED_CE_CUDA_H
#include <cuda_runtime.h>
#include "lctx/device_rows.h"

namespace lctx::chunked_ce::cuda {

struct Rows {
  float* logits;        /* [rows, vocab] f32; with `gradient`, the first half of each row becomes d(logits) in bf16 */
  DeviceRows bias;      /* [vocab]; data null: none */
  const int32_t* labels; /* checked by the host */
  const float* weights; /* [rows] or null */
  float* loss;          /* [rows] */
  int64_t rows, vocab, ld;
  float logit_scale, soft_cap, label_smoothing, z_loss, inverse_tokens;
  bool gradient;
};
int cross_entropy_rows(const Rows& p, cudaStream_t stream);

/* sum[0] + sum[1] (two f32, high and low part) += sum of loss[rows], in order. */
int add_losses(const float* loss, int64_t rows, float* sum, cudaStream_t stream);

/* dst row i = src row index[i], or the other way round; rows of `bytes` bytes, `ld*` bytes apart. */
struct Move {
  const void* src;
  void* dst;
  const int32_t* index;
  int64_t rows, bytes, ldsrc, lddst;
  bool gather;
};
int move_rows(const Move& p, cudaStream_t stream);

}  // namespace lctx::chunked_ce::cuda
#endif
