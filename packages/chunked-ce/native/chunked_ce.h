/* Cross-entropy over one chunk of logits: loss per row, and optionally d(loss)/d(logits) written over the logits. Plain C++. */
#ifndef LCTX_CHUNKED_CE_H
#define LCTX_CHUNKED_CE_H
#include <cstdint>

namespace lctx::chunked_ce {

struct RowsParams {
  float* logits;         /* [rows, vocab], raw h W^T; overwritten by the gradient when `gradient` */
  const float* bias;     /* [vocab] or null; added before scaling and capping */
  const int32_t* labels; /* [rows], each in [0, vocab) */
  const float* weights;  /* [rows] per-token weights or null */
  float* loss;           /* [rows]: weighted, not yet divided by the token count */
  int64_t rows, vocab, ld;
  float logit_scale;     /* z = logit_scale * (logits + bias) */
  float soft_cap;        /* z = cap * tanh(z / cap); 0 = off (Gemma 2) */
  float label_smoothing; /* PyTorch's: (1 - eps) * nll + eps * mean over the vocabulary of -log p */
  float z_loss;          /* + z_loss * lse^2 (PaLM, 2022) */
  float inverse_tokens;  /* the gradient is scaled by weight * inverse_tokens */
  bool gradient;
};

void cross_entropy_rows(const RowsParams& p);

/* Rows index[i] of src [*, width] to row i of dst. */
struct GatherParams {
  const float* src;
  float* dst;
  const int32_t* index;
  int64_t rows, width, ldsrc, lddst;
};
void gather_rows(const GatherParams& p);
void scatter_rows(const GatherParams& p); /* row i of src to row index[i] of dst */

}  // namespace lctx::chunked_ce
#endif
