/* Kernels of @lc/tiled-mlp: gated activations, and the routing of a mixture of experts. Plain C++; the caller has checked the sizes.
 * ld* = elements between rows. A "pair" is (token, j-th of its experts), numbered token * top_k + j; a "row" is a pair's place in expert order. */
#ifndef LCTX_TILED_MLP_H
#define LCTX_TILED_MLP_H
#include <cstdint>

namespace lctx::mlp {

enum Activation : int32_t { kSilu = 0, kGeluErf = 1, kGeluTanh = 2, kGptOss = 3 };

/* Forward: out = activation(gate) * up. kGptOss: gate and up lie interleaved in `gate`; gate = min(gate, limit), up = clamp(up, -limit, limit),
 * out = (up + 1) * gate * sigmoid(alpha * gate).
 * Backward: gate and up are overwritten by their gradients. */
struct GluParams {
  float *gate, *up;
  float* out;        /* forward [rows, width] */
  const float* dout; /* backward [rows, width] */
  float* dots;       /* backward, optional: [rows], <activation(gate) * up, dout> of each row, which routing's gradient needs */
  /* Optional: bias of each expert, added to the gate (and up) columns in place first. Backward: where the forward has not done it. */
  const float* bias;      /* [experts, bias_width], laid out as a row of gate/up */
  const int32_t* ids;     /* [pairs] */
  const int32_t* pair_of; /* [rows] */
  int64_t bias_width, rows, width, ldgate, ldup, ldout, lddout;
  float limit, alpha;
  int32_t activation;
};
void glu(const GluParams& p);
void glu_backward(const GluParams& p);

/* Top-k routing. Ties go to the lower expert. Everything is determined by the logits alone, so a recomputation routes alike. */
struct RouteParams {
  float* logits; /* [tokens, experts]; when `softmax_first`, overwritten by the probabilities */
  int64_t tokens, experts, top_k, ldlogits;
  bool softmax_first; /* softmax over all, then top-k (Qwen3-MoE); else top-k, then softmax over the k (gpt-oss) */
  bool normalize;     /* softmax_first: divide the k probabilities by their sum */
  int32_t* ids;       /* [pairs], best first */
  float* weights;     /* [pairs] */
  int32_t* pair_of;   /* [rows]: by expert, then by pair */
  int32_t* row_of;    /* [pairs] */
  int32_t* offsets;   /* [experts + 1] */
};
void route(const RouteParams& p);

/* Gradient to the logits. With s = weight * d(loss)/d(weight) of a pair = <dact, act> + <dy, bias>, where dact and dy carry the weight already:
 * softmax over the k: dlogit_i = s_i - w_i * sum_j s_j; softmax over all: dlogit_e = s_e - p_e * sum_j s_j. No division by a weight, so 0 is safe. */
struct RouteBackwardParams {
  const float* dots;       /* [rows]: <dact, act> as glu_backward left it; then act and dact are not read. Or null */
  const float *act, *dact; /* [rows, width]: the down projection's input and its gradient */
  const float *dy, *bias;  /* [rows, hidden], [experts, hidden]; bias may be null */
  const float* weights;
  const float* probabilities; /* [tokens, experts] where the softmax ran over all and was not normalized; else null */
  const int32_t *ids, *row_of;
  float* dlogits; /* [tokens, experts] */
  int64_t tokens, experts, top_k, width, hidden, ldact, lddact, lddy, ldprobabilities, lddlogits;
};
void route_backward(const RouteBackwardParams& p);

/* out[row of each of a token's pairs] = x[token], times the pair's weight where given: a token is read once. */
struct GatherParams {
  const float *x, *weights;
  const int32_t* row_of;
  float* out;
  int64_t tokens, width, top_k, ldx, ldout;
};
void gather(const GatherParams& p);

/* out[token] = base[token] + sum_j weight_j * (y[row of pair j] + bias[expert of pair j]), in the order of j; base, weights, bias may be null. */
struct CombineParams {
  const float *y, *base, *weights, *bias;
  const int32_t *row_of, *ids;
  float* out; /* may be base */
  int64_t tokens, width, top_k, ldy, ldbase, ldout;
};
void combine(const CombineParams& p);

}  // namespace lctx::mlp
#endif
