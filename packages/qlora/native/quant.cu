/* 4 bits to bf16 or f32. Neighbouring threads write neighbouring 16 bytes: 8 values of bf16 from 4 bytes of codes, or 4 of f32 from 2. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "lctx/abi.h"

namespace lc_qlora::cuda {
namespace {

constexpr int THREADS = 256;
__constant__ float kNf4Levels[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                                     -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
/* Codes in one 16-byte store of Out, and the word that holds them. */
template <typename Out>
struct Lane;
template <>
struct Lane<__nv_bfloat16> {
  static constexpr int CODES = 8;
  using Word = uint32_t;
  static __device__ __forceinline__ void store(__nv_bfloat16* out, const float (&v)[8]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};
template <>
struct Lane<float> {
  static constexpr int CODES = 4;
  using Word = uint16_t;
  static __device__ __forceinline__ void store(float* out, const float (&v)[4]) { *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]); }
};

constexpr int AHEAD = 4; /* words of a thread that are read before the first is decoded */

/* Calls f(i, word) for this thread's AHEAD words, those that exist. */
template <typename F>
__device__ __forceinline__ void each_word(int64_t words, F&& f) {
  const int64_t first = blockIdx.x * static_cast<int64_t>(THREADS * AHEAD) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    const int64_t w = first + i * THREADS;
    if (w < words) f(i, w);
  }
}

template <typename Out>
__global__ void __launch_bounds__(THREADS) nf4_kernel(Nf4Dequantize p, const float* map, int block_shift) {
  constexpr int CODES = Lane<Out>::CODES;
  using Word = typename Lane<Out>::Word;
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = kNf4Levels[threadIdx.x];
  __syncthreads();
  Out* out = static_cast<Out*>(p.out);
  const int64_t words = p.n / CODES;
  Word codes[AHEAD];
  float scales[AHEAD];
  each_word(words, [&](int i, int64_t w) {
    codes[i] = __ldg(reinterpret_cast<const Word*>(p.codes) + w);
    const int64_t b = w * CODES >> block_shift;
    // No fma: the CPU's loop rounds the product, then the sum, and the bits are to be the same.
    scales[i] = p.absmax ? __ldg(p.absmax + b) : __fadd_rn(__fmul_rn(__ldg(map + __ldg(p.codes2 + b)), __ldg(p.scales + b / kScaleBlock)), __ldg(p.offset));
  });
  each_word(words, [&](int i, int64_t w) {
    float v[CODES];
#pragma unroll
    for (int c = 0; c < CODES; c++) v[c] = table[codes[i] >> (4 * (c ^ 1)) & 15] * scales[i];  // the high half of a byte comes first
    Lane<Out>::store(out + w * CODES, v);
  });
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    for (int64_t i = words * CODES; i < p.n; i++) {
      const int64_t b = i >> block_shift;
      const float scale = p.absmax ? p.absmax[b] : __fadd_rn(__fmul_rn(map[p.codes2[b]], p.scales[b / kScaleBlock]), *p.offset);
      out[i] = static_cast<Out>(table[i % 2 ? p.codes[i / 2] & 15 : p.codes[i / 2] >> 4] * scale);
    }
  }
}

/* 2^(e - 127); 255 is NaN. */
__device__ __forceinline__ float power(uint32_t e) {
  return e == 255 ? __int_as_float(0x7fc00000) : e == 0 ? __int_as_float(0x00400000) : __uint_as_float(e << 23);
}

template <typename Out>
__global__ void __launch_bounds__(THREADS) mxfp4_kernel(Mxfp4 p) {
  constexpr int CODES = Lane<Out>::CODES, PER_SCALE = static_cast<int>(kMxBlock) / CODES;
  using Word = typename Lane<Out>::Word;
  Out* out = static_cast<Out*>(p.values);
  const int64_t words = p.n / CODES;
  Word codes[AHEAD];
  uint8_t scales[AHEAD];
  each_word(words, [&](int i, int64_t w) {
    codes[i] = __ldg(reinterpret_cast<const Word*>(p.blocks) + w);
    scales[i] = __ldg(p.scales + w / PER_SCALE);
  });
  each_word(words, [&](int i, int64_t w) {
    const float scale = power(scales[i]);
    float v[CODES];
#pragma unroll
    for (int c = 0; c < CODES; c++) {
      // Exponent and mantissa of E2M1 at the low end of an f32's exponent and the high end of its mantissa: the value times 2^-126, subnormals included.
      const uint32_t code = static_cast<uint32_t>(codes[i]) >> (4 * c);
      v[c] = __uint_as_float((code << 28 & 0x80000000u) | (code << 22 & 0x01c00000u)) * 0x1p126f * scale;
    }
    Lane<Out>::store(out + w * CODES, v);
  });
}

template <typename Out>
unsigned blocks(int64_t n) {
  constexpr int64_t kPerBlock = static_cast<int64_t>(THREADS) * AHEAD * Lane<Out>::CODES;
  return static_cast<unsigned>((n + kPerBlock - 1) / kPerBlock);
}
template <typename Out>
int launch_nf4(const Nf4Dequantize& p, const float* map, cudaStream_t s) {
  int shift = 0;
  while (int64_t{1} << shift < p.block) shift++;  // a power of two
  nf4_kernel<Out><<<blocks<Out>(p.n), THREADS, 0, s>>>(p, map, shift);
  return cudaGetLastError();
}
template <typename Out>
int launch_mxfp4(const Mxfp4& p, cudaStream_t s) {
  mxfp4_kernel<Out><<<blocks<Out>(p.n), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}

}  // namespace

int nf4_dequantize(const Nf4Dequantize& p, const float* map, cudaStream_t s) {
  if (p.n == 0) return 0;
  return p.out_dtype == LCTX_F32 ? launch_nf4<float>(p, map, s) : launch_nf4<__nv_bfloat16>(p, map, s);
}
int mxfp4_dequantize(const Mxfp4& p, cudaStream_t s) {
  if (p.n == 0) return 0;
  return p.dtype == LCTX_F32 ? launch_mxfp4<float>(p, s) : launch_mxfp4<__nv_bfloat16>(p, s);
}

}  // namespace lc_qlora::cuda
