/* Launchers of the CUDA kernels: plain structs, CUDA statuses as int (0 = launched). Meaning of the fields as in attention.h; activations are bf16. */
#ifndef LC_ATTENTION_CUDA_KERNELS_H
#define LC_ATTENTION_CUDA_KERNELS_H
#include <cstdint>

namespace attention::cuda {

constexpr int kMaxDim = 256;       /* larger head dims need other tiles */
constexpr int kMaxRopePairs = 128; /* frequencies travel as kernel arguments */
constexpr int kSinkParts = 128;    /* partial sums of dSinks */
/* Shared memory that a block may take on every card of compute capability 8.0 and up: 8.6, 8.9 and 12.0 have no more. */
constexpr int kSharedEverywhere = 99 << 10;

struct Problem {
  const void *q, *k, *v; /* bf16, 16-byte aligned rows */
  int64_t q_stride, k_stride, v_stride;
  int32_t n, heads, kv_heads, group, dim, start, window; /* window 0: none; n * group < 2^31 */
  uint32_t group_magic, group_shift; /* row / group = row * magic >> shift; see set_group */
  float scale;
  const int32_t* doc_start; /* on the device, or null */
  const float* sinks;       /* on the device, or null */
};

/* Division of numbers below 2^31 by `group` as a product (Granlund and Montgomery 1994). */
inline void set_group(Problem& p, int32_t group) {
  uint32_t bits = 0;
  while ((int64_t{1} << bits) < group) bits++;
  p.group = group;
  p.group_shift = 31 + bits;
  p.group_magic = static_cast<uint32_t>(((uint64_t{1} << p.group_shift) + static_cast<uint64_t>(group) - 1) / static_cast<uint64_t>(group));
}

struct Forward {
  Problem p;
  void* out; /* bf16 */
  int64_t out_stride;
  float* lse;
};

struct Backward {
  Problem p;
  const void *out, *dout; /* bf16 */
  int64_t out_stride, dout_stride;
  const float* lse;
  void* dq; /* bf16, overwritten */
  int64_t dq_stride;
  float *dk, *dv; /* added to */
  int64_t dk_stride, dv_stride;
  float* dsinks;       /* or null */
  float* delta;        /* [n, heads] scratch */
  float* sink_partial; /* [kSinkParts, heads] scratch; with dsinks */
  float* dq_sum;       /* scratch of backward_fused_floats(p), or null: sums in a fixed order */
  float* hopper;       /* scratch of hopper_backward_floats(p), for hopper_backward */
  bool ordered;        /* hopper_backward: dQ in a fixed order of additions */
};

struct Rope {
  void* x; /* [n, heads, dim], in place */
  bool f32;
  int64_t n, stride;
  int32_t heads, dim, pairs, start;
  const int32_t* doc_start;
  float sign; /* -1: the transposed map */
  double factor;
  double inv_freq[kMaxRopePairs];
};

int forward(const Forward& f, void* stream);
/* Hopper cards: why not for this problem, or null; and the pass itself. */
const char* hopper_forward_refuses(const Problem& p);
int hopper_forward(const Forward& f, void* stream);
/* Whether the current device is a Hopper card and this build has code for it. */
bool hopper_card();
const char* hopper_backward_refuses(const Backward& b);
int64_t hopper_backward_floats(const Problem& p);
int hopper_backward(const Backward& b, void* stream);
/* Its kernel behind short windows, and where so few keys are seen that a window of all is short: no scratch but sink_partial, one order of additions. */
constexpr int kHopperWindowSmem = 217536; /* shared memory of a block */
bool hopper_backward_window_takes(const Problem& p);
int hopper_backward_window(const Backward& b, void* stream);
int backward(const Backward& b, void* stream); /* all of the following, in order */
int backward_delta(const Backward& b, void* stream);
int backward_kv(const Backward& b, void* stream);
int backward_q(const Backward& b, void* stream);
/* dQ, dK and dV in one kernel, dQ summed in no fixed order in `dq_sum`: for full attention at head dims where that is faster. Floats that it needs of
 * [n, heads, dim], rows and dims rounded up to tiles; 0: not for this problem. */
int64_t backward_fused_floats(const Problem& p);
int backward_fused(const Backward& b, void* stream);
int rope(const Rope& r, void* stream);

}  // namespace attention::cuda
#endif
