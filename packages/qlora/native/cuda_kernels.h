/* Launchers of the CUDA kernels; they return a cudaError_t as int. */
#ifndef LC_QLORA_CUDA_H
#define LC_QLORA_CUDA_H
#include <cuda_runtime.h>
#include "lctx/device_rows.h"
#include "lora.h"
#include "optim.h"
#include "quant.h"

namespace lc_qlora::cuda {

int nf4_dequantize(const Nf4Dequantize& p, const float* map, cudaStream_t stream); /* map: signed dynamic map [256] on the device */
int mxfp4_dequantize(const Mxfp4& p, cudaStream_t stream);

struct DropoutRows {
  lctx::DeviceRows x, out;
  int64_t rows, width;
  uint64_t seed, start;
  uint32_t site, threshold;
  float scale;
  bool accumulate;
};
int dropout(const DropoutRows& p, cudaStream_t stream);
/* grouped in its own dtype (f32 or bf16). */
int gather_expert_b(const ExpertB& p, cudaStream_t stream);
int scatter_expert_b(const ExpertB& p, cudaStream_t stream);

struct AdamScalars {
  float beta2, rest1, rest2, eps, decay, step_size, root_bias2, grad_scale;
};
int adamw(const AdamSegment& s, const AdamScalars& p, const float* maps, cudaStream_t stream); /* maps: signed then unsigned, [512] */

/* Some gradients, in one launch: an adapter has hundreds of small ones. */
struct Gradients {
  static constexpr int kMost = 128;
  const float* at[kMost];
  int64_t n[kMost];
  uint32_t chunks[kMost + 1]; /* of kChunk elements, of all gradients before */
  int count;
};
/* partial[i] of each chunk of kChunk elements; then total = their sum in order, in f64. */
int square_sums(const Gradients& g, double* partial, cudaStream_t stream);
int add_up(const double* partial, int64_t n, double* total, cudaStream_t stream);

}  // namespace lc_qlora::cuda
#endif
