/* GEMM by FFMA, operands f32 or bf16 in any mixture, arithmetic f32: what is neither bf16 nor narrow (gemm_narrow.cuh). 128 x 128 of c per block, 8 x 8 per thread, or 128 x 16, 8 x 1 per thread, for the small ranks of LoRA; the next 16 of k travel from
 * memory to registers while the present ones are multiplied. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "gemm_tiles.cuh"

namespace lctx::cuda {
namespace {

constexpr int BM = 128, BK = 16, THREADS = 256;

__device__ __forceinline__ float as_float(float v) { return v; }
__device__ __forceinline__ float as_float(__nv_bfloat16 v) { return __bfloat162float(v); }

/* One operand: R (m or n) x 16 (k). Neighbouring threads read neighbouring addresses, whichever way it lies. */
template <typename T, int R>
struct Operand {
  static constexpr int READS = R * BK / THREADS;
  const T* at;
  int64_t step, pass; /* elements between tiles, and between a thread's reads */
  uint32_t valid;     /* bit per read: its row exists */
  int k0, r0, k_pass, r_pass;

  __device__ __forceinline__ Operand(const T* source, int64_t ld, bool k_contiguous, int64_t first, int64_t rows) {
    k0 = k_contiguous ? threadIdx.x % BK : threadIdx.x / R;
    r0 = k_contiguous ? threadIdx.x / BK : threadIdx.x % R;
    k_pass = k_contiguous ? 0 : THREADS / R;
    r_pass = k_contiguous ? THREADS / BK : 0;
    at = source + (k_contiguous ? (first + r0) * ld + k0 : k0 * ld + first + r0);
    pass = (k_contiguous ? r_pass : k_pass) * ld;
    step = k_contiguous ? static_cast<int64_t>(BK) : BK * ld;
    valid = 0;
    for (int i = 0; i < READS; i++) valid |= (first + r0 + i * r_pass < rows ? 1u : 0u) << i;
  }
  __device__ __forceinline__ void read(T (&v)[READS], int64_t k_left) {
#pragma unroll
    for (int i = 0; i < READS; i++) v[i] = (valid >> i & 1) && k0 + i * k_pass < k_left ? at[i * pass] : static_cast<T>(0.0f);
    at += step;
  }
  __device__ __forceinline__ void write(const T (&v)[READS], float (&tile)[BK][R + 4]) const {
#pragma unroll
    for (int i = 0; i < READS; i++) tile[k0 + i * k_pass][r0 + i * r_pass] = as_float(v[i]);
  }
};

template <typename A, typename B, int BN>
__global__ void __launch_bounds__(THREADS, 2) gemm_ffma_kernel(const __grid_constant__ GemmLaunch p) {
  __shared__ __align__(16) float sa[2][BK][BM + 4], sb[2][BK][BN + 4];
  TileOf tile;
  if (!find_tile<BM, BN>(p, blockIdx.x, &tile)) return;
  const int64_t m0 = tile.m * BM, n0 = tile.n * BN;
  Operand<A, BM> a(static_cast<const A*>(p.a) + tile.a, p.lda, !p.trans_a, m0, tile.rows);
  Operand<B, BN> b(static_cast<const B*>(p.b) + tile.b, p.ldb, p.trans_b, n0, p.n);
  // A thread's rows: ty*4.. and 64 + ty*4.., columns likewise (or one): reads of four floats without bank conflicts.
  constexpr int COLUMNS = BN / 16, ACROSS = BN == 128 ? 4 : 1;
  const int tx = threadIdx.x % 16 * ACROSS, ty = threadIdx.x / 16 * 4;

  float acc[8][COLUMNS] = {};
  A va[Operand<A, BM>::READS];
  B vb[Operand<B, BN>::READS];
  a.read(va, tile.k);
  b.read(vb, tile.k);
  int buffer = 0;
  for (int64_t left = tile.k; left > 0; left -= BK, buffer ^= 1) {
    a.write(va, sa[buffer]);
    b.write(vb, sb[buffer]);
    __syncthreads();  // the other buffer is free too: everyone has passed its multiplications
    if (left > BK) {
      a.read(va, left - BK);
      b.read(vb, left - BK);
    }
#pragma unroll
    for (int kk = 0; kk < BK; kk++) {
      float ra[8], rb[COLUMNS];
#pragma unroll
      for (int h = 0; h < 2; h++) *reinterpret_cast<float4*>(ra + h * 4) = *reinterpret_cast<const float4*>(&sa[buffer][kk][ty + h * 64]);
      if constexpr (COLUMNS == 8) {
#pragma unroll
        for (int h = 0; h < 2; h++) *reinterpret_cast<float4*>(rb + h * 4) = *reinterpret_cast<const float4*>(&sb[buffer][kk][tx + h * 64]);
      } else {
        rb[0] = sb[buffer][kk][tx];
      }
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) acc[i][j] += ra[i] * rb[j];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      const int64_t row = m0 + ty + i / 4 * 64 + i % 4, column = n0 + tx + j / 4 * 64 + j % 4;
      if (row >= tile.rows || column >= p.n) continue;
      const int64_t at = tile.c + row * p.ldc + column;
      store_c(p, at, p.alpha * acc[i][j]);
    }
}

template <typename A, typename B>
int launch(const GemmLaunch& p, cudaStream_t s) {
  if (p.n <= 32) gemm_ffma_kernel<A, B, 16><<<TileGrid<BM, 16>(p).count(p), THREADS, 0, s>>>(p);
  else gemm_ffma_kernel<A, B, 128><<<TileGrid<BM, 128>(p).count(p), THREADS, 0, s>>>(p);
  return cudaGetLastError();
}

}  // namespace

int launch_gemm_ffma(const GemmLaunch& p, bool a_f32, bool b_f32, void* stream) {
  if (p.m == 0 || p.n == 0 || (p.offsets != nullptr && p.experts == 0)) return 0;
  int status = 0;
  if (launch_gemm_narrow(p, a_f32, b_f32, stream, &status)) return status;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a_f32) return b_f32 ? launch<float, float>(p, s) : launch<float, __nv_bfloat16>(p, s);
  return b_f32 ? launch<__nv_bfloat16, float>(p, s) : launch<__nv_bfloat16, __nv_bfloat16>(p, s);
}

}  // namespace lctx::cuda
