/* A kernel of this addon's own: proof that separately built addons, each with its own CUDA runtime inside, share memory, streams and events. */
#include <cuda_runtime.h>
#include <cstdint>

static __global__ void scale_kernel(float* x, int64_t n, float factor) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < n) x[i] *= factor;
}

int launch_scale(float* x, int64_t n, float factor, void* stream) {
  scale_kernel<<<static_cast<unsigned>((n + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(x, n, factor);
  return cudaGetLastError();
}
