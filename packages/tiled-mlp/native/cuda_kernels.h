/* Launchers of the CUDA kernels: as tiled_mlp.h, with operands in f32 or bf16. They return a cudaError_t as int. */
#ifndef LCTX_TILED_MLP_CUDA_H
#define LCTX_TILED_MLP_CUDA_H
#include <cuda_runtime.h>
#include "lctx/device_rows.h"
#include "tiled_mlp.h"

namespace lctx::mlp::cuda {

struct Glu {
  DeviceRows gate, up, out, dout, bias; /* bias.data null: none */
  const int32_t *ids, *pair_of;
  int64_t rows, width;
  float limit, alpha;
  int32_t activation;
  float* dots; /* backward, may be null: [rows] */
  bool keep;   /* forward with a bias: gate and up are written back with it, which only a backward needs */
};
int glu(const Glu& p, cudaStream_t stream);
int glu_backward(const Glu& p, cudaStream_t stream);

int route(const RouteParams& p, cudaStream_t stream);

struct RouteBackward {
  const float* dots; /* not null: act and dact are not read */
  DeviceRows act, dact, dy, bias, probabilities, dlogits;
  const float* weights;
  const int32_t *ids, *row_of;
  int64_t tokens, experts, top_k, width, hidden;
};
int route_backward(const RouteBackward& p, cudaStream_t stream);

struct Gather {
  DeviceRows x, out;
  const float* weights;
  const int32_t* row_of;
  int64_t tokens, width, top_k;
};
int gather(const Gather& p, cudaStream_t stream);

struct Combine {
  DeviceRows y, base, bias, out;
  const float* weights;
  const int32_t *row_of, *ids;
  int64_t tokens, width, top_k;
};
int combine(const Combine& p, cudaStream_t stream);

}  // namespace lctx::mlp::cuda
#endif
