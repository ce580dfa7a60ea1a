/* What the attention kernels share: copies into swizzled tiles, tensor-core fragments, and which keys a row of a tile sees.
 *
 * The queries of the `group` heads that read one K/V head are worked on as one matrix of n * group rows, row = query * group + head: a tile then spans few
 * queries, so that windows, documents and the diagonal cut little of it, and neighbouring rows are neighbours in memory. */
#ifndef LC_ATTENTION_TILES_CUH
#define LC_ATTENTION_TILES_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_kernels.h"
#include "lctx/mma.cuh"
#include "lctx/shared_memory.h"

namespace attention::cuda {

using bf16 = __nv_bfloat16;
using lctx::cuda::allow_shared_memory;
using lctx::warp::cp_async_commit, lctx::warp::cp_async_wait, lctx::warp::ldmatrix, lctx::warp::mma, lctx::warp::pack, lctx::warp::smem_address, lctx::warp::transpose_quad;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

/* 16 bytes; zeros unless `valid`. */
__device__ __forceinline__ void cp_async(uint32_t dst, const void* src, bool valid) { lctx::warp::cp_async(dst, src, valid ? 16 : 0); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
/* Rows of HD bf16 in shared memory; chunks of 16 bytes are permuted within a row so that neither ldmatrix nor cp.async meets bank conflicts. */
template <int HD>
struct Rows {
  static constexpr int CHUNKS = HD / 8, BYTES = HD * 2;
  static __device__ __forceinline__ int key(int row) { return HD % 64 == 0 ? row & 7 : (row >> 1) & 3; }
  static __device__ __forceinline__ uint32_t at(int row, int chunk) { return static_cast<uint32_t>(row * BYTES + ((chunk ^ key(row)) << 4)); }
};

/* ldmatrix addresses of one lane. `row`: the lane's row, `chunk` its chunk within the first 16 columns; other 16-row and 16-column steps by get(). */
template <int HD>
struct Fragment {
  uint32_t row_at, column;
  __device__ __forceinline__ Fragment(int row, int chunk) : row_at(row * Rows<HD>::BYTES), column((chunk ^ Rows<HD>::key(row)) << 4) {}
  /* The 16 x 16 at rows 16 i, columns 16 j. */
  __device__ __forceinline__ uint32_t get(uint32_t base, int i, int j) const { return base + row_at + (column ^ (j << 5)) + i * 16 * Rows<HD>::BYTES; }
};
/* a: row-major m x k. b: k contiguous per n. t: stored as rows of k with n contiguous, read transposed. */
template <int HD>
__device__ __forceinline__ Fragment<HD> a_fragment(int row0) { const int l = threadIdx.x % 32; return {row0 + (l & 15), l >> 4}; }
template <int HD>
__device__ __forceinline__ Fragment<HD> b_fragment() { const int l = threadIdx.x % 32; return {(l & 7) + (l >> 4) * 8, (l >> 3) & 1}; }
template <int HD>
__device__ __forceinline__ Fragment<HD> t_fragment() { const int l = threadIdx.x % 32; return {l & 15, l >> 4}; }

/* A's 16-row fragments at columns 16 kk. */
template <int HD, int MI>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[MI][4], const Fragment<HD>& at, uint32_t tile, int kk) {
#pragma unroll
  for (int i = 0; i < MI; i++) ldmatrix(a[i], at.get(tile, i, kk));
}
/* Columns 16 j .. 16 j + 15 of acc += a f. */
template <int MI, int N>
__device__ __forceinline__ void multiply16(float (&acc)[MI][N][4], const uint32_t (&a)[MI][4], const uint32_t (&f)[4], int j) {
#pragma unroll
  for (int i = 0; i < MI; i++) {
    mma(acc[i][j * 2], a[i], f[0], f[1]);
    mma(acc[i][j * 2 + 1], a[i], f[2], f[3]);
  }
}
/* acc += A B^T for 16 of k, columns 16 kk of both tiles; B's rows are acc's columns. `at`: b_fragment. */
template <int HD, int MI, int N>
__device__ __forceinline__ void multiply_rows(float (&acc)[MI][N][4], const uint32_t (&a)[MI][4], const Fragment<HD>& at, uint32_t tile, int kk) {
#pragma unroll
  for (int j = 0; j < N / 2; j++) {
    uint32_t f[4];
    ldmatrix(f, at.get(tile, j, kk));
    multiply16(acc, a, f, j);
  }
}
/* acc += A B^T over all head dims. */
template <int HD, int MI, int N>
__device__ __forceinline__ void multiply_tiles(float (&acc)[MI][N][4], const Fragment<HD>& a_at, uint32_t a_tile, const Fragment<HD>& b_at, uint32_t b_tile) {
#pragma unroll
  for (int kk = 0; kk < HD / 16; kk++) {
    uint32_t a[MI][4];
    load_fragments(a, a_at, a_tile, kk);
    multiply_rows(acc, a, b_at, b_tile, kk);
  }
}
/* acc += A B for 16 of k, rows 16 kk of B's tile; its columns from 16 j0 on are acc's. `at`: t_fragment. */
template <int HD, int MI, int N>
__device__ __forceinline__ void multiply_columns(float (&acc)[MI][N][4], const uint32_t (&a)[MI][4], const Fragment<HD>& at, uint32_t tile, int kk, int j0 = 0) {
#pragma unroll
  for (int j = 0; j < N / 2; j++) {
    uint32_t f[4];
    ldmatrix<true>(f, at.get(tile, kk, j0 + j));
    multiply16(acc, a, f, j);
  }
}
/* Columns 16 kk .. of an accumulator, rounded to bf16: the left operand of the next product. */
template <int N>
__device__ __forceinline__ void pack_columns(uint32_t (&a)[4], const float (&acc)[N][4], int kk) {
  a[0] = pack(acc[kk * 2][0], acc[kk * 2][1]);
  a[1] = pack(acc[kk * 2][2], acc[kk * 2][3]);
  a[2] = pack(acc[kk * 2 + 1][0], acc[kk * 2 + 1][1]);
  a[3] = pack(acc[kk * 2 + 1][2], acc[kk * 2 + 1][3]);
}

/* Copies ROWS rows into a tile; `source(row)` gives a row's address and null for a row of zeros. */
template <int HD, int ROWS, int THREADS, class F>
__device__ __forceinline__ void load_tile(uint32_t tile, int dim, const void* any, F&& source) {
  constexpr int CHUNKS = Rows<HD>::CHUNKS, TOTAL = ROWS * CHUNKS;
#pragma unroll
  for (int x0 = 0; x0 < TOTAL; x0 += THREADS) {
    const int x = x0 + threadIdx.x;
    if (TOTAL % THREADS != 0 && x >= TOTAL) break;
    const int row = x / CHUNKS, chunk = x % CHUNKS;
    const bf16* from = source(row);
    const bool valid = from != nullptr && chunk * 8 < dim;
    cp_async(tile + Rows<HD>::at(row, chunk), valid ? from + chunk * 8 : any, valid);
  }
}

/* The query of a row: row / group. */
__device__ __forceinline__ int query_of(const Problem& p, int row) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(row)) * p.group_magic >> p.group_shift);
}

/* Copies tiles of BN keys of one K/V head; rows outside begin .. end become zeros. Addresses move along with the tiles where the shapes allow it. */
template <int HD, int BN, int THREADS>
struct KeyTiles {
  static constexpr int CHUNKS = Rows<HD>::CHUNKS, STEP = THREADS / CHUNKS;
  static constexpr bool REGULAR = THREADS % CHUNKS == 0 && STEP % 8 == 0 && BN % STEP == 0;
  const bf16* head; /* key 0 of this head */
  int64_t stride;
  uint32_t to;
  bool exists;
  __device__ __forceinline__ KeyTiles(const void* x, int64_t stride_, int kv_head, int dim)
      : head(static_cast<const bf16*>(x) + static_cast<int64_t>(kv_head) * dim), stride(stride_), to(0), exists(true) {
    if constexpr (REGULAR) {
      const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
      to = Rows<HD>::at(row, chunk);
      exists = chunk * 8 < dim;
      if (exists) head += row * stride + chunk * 8;
    }
  }
  __device__ __forceinline__ void load(uint32_t tile, int key0, int begin, int end, int dim, const void* any) const {
    if constexpr (REGULAR) {
      const bool whole = exists && key0 >= begin && key0 + BN <= end;
      const bf16* from = head + key0 * stride;
      const int row = key0 + static_cast<int>(threadIdx.x) / CHUNKS;
#pragma unroll
      for (int i = 0; i < BN / STEP; i++) {
        const bool valid = whole || (exists && row + i * STEP >= begin && row + i * STEP < end);
        cp_async(tile + to + i * STEP * Rows<HD>::BYTES, valid ? from : any, valid);
        from += STEP * stride;
      }
    } else {
      load_tile<HD, BN, THREADS>(tile, dim, any, [&](int r) -> const bf16* { return key0 + r >= begin && key0 + r < end ? head + (key0 + r) * stride : nullptr; });
    }
  }
};

/* First key that query i sees; does not decrease with i. */
__device__ __forceinline__ int first_key(const Problem& p, int i) {
  int low = p.doc_start ? max(0, p.doc_start[i]) : 0;  // the host has not looked at device memory
  if (p.window > 0) low = max(low, p.start + i - p.window + 1);
  return min(low, p.start + i);
}

/* The first i of [low, high) with values[i] above `value`, or high; values do not decrease. */
__device__ __forceinline__ int first_above(const int* values, int low, int high, int value) {
  while (low < high) {
    const int middle = (low + high) / 2;
    if (values[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

/* One past the last query, from `begin` on, that sees any key up to `last_key`. */
__device__ __forceinline__ int end_of_queries(const Problem& p, int begin, int last_key) {
  int end = p.n;
  if (p.window > 0) end = static_cast<int>(min(static_cast<int64_t>(end), static_cast<int64_t>(last_key) + p.window - p.start));
  if (p.doc_start) end = first_above(p.doc_start, begin, max(end, begin), last_key);  // up to the first document that begins after the keys
  return end;
}

/* Copies rows row0 .. of q and of dout, both from their first head of the group on, into two tiles; those from `row_end` on become zeros. */
template <int HD, int BM, int THREADS>
__device__ __forceinline__ void load_row_tiles(const Backward& b, const bf16* q, const bf16* dout, uint32_t sq, uint32_t sdo, int row0, int row_end) {
  constexpr int CHUNKS = HD / 8, TOTAL = BM * CHUNKS;
  const Problem& p = b.p;
#pragma unroll
  for (int x0 = 0; x0 < TOTAL; x0 += THREADS) {
    const int x = x0 + threadIdx.x;
    if (TOTAL % THREADS != 0 && x >= TOTAL) break;
    const int r = x / CHUNKS, chunk = x % CHUNKS, row = row0 + r;
    const bool valid = row < row_end && chunk * 8 < p.dim;
    const int query = query_of(p, row), column = (row - query * p.group) * p.dim + chunk * 8;
    cp_async(sq + Rows<HD>::at(r, chunk), valid ? q + query * p.q_stride + column : p.q, valid);
    cp_async(sdo + Rows<HD>::at(r, chunk), valid ? dout + query * b.dout_stride + column : b.dout, valid);
  }
}

/* dS^T = P^T (dP^T - delta), in place of dP^T. P is in f32: rounded as for dV it would double the error of dK and dQ where few scores carry a gradient. `delta`: of this lane's first row. */
template <int MI, int N>
__device__ __forceinline__ void score_gradients(float (&d)[MI][N][4], const float (&prob)[MI][N][4], const float* delta) {
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float2 pair = *reinterpret_cast<const float2*>(delta + j * 8);
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) d[i][j][e] = prob[i][j][e] * (d[i][j][e] - (e % 2 ? pair.y : pair.x));
  }
}

/* dK and dV of this warp's keys, first_key on, are added to memory; of the head dims from dim0 on. */
template <int MI, int N>
__device__ __forceinline__ void add_to_keys(const Backward& b, const float (&dk)[MI][N][4], const float (&dv)[MI][N][4], int kv_head, int first_key, int keys, int dim0) {
  const Problem& p = b.p;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int key = first_key + i * 16 + h * 8 + lane / 4;
      if (key >= keys) continue;
      float* to_k = b.dk + key * b.dk_stride + static_cast<int64_t>(kv_head) * p.dim;
      float* to_v = b.dv + key * b.dv_stride + static_cast<int64_t>(kv_head) * p.dim;
#pragma unroll
      for (int j = 0; j < N; j++) {
        const int column = dim0 + j * 8 + lane % 4 * 2;
        if (column >= p.dim) continue;
        float2* at_k = reinterpret_cast<float2*>(to_k + column);
        float2* at_v = reinterpret_cast<float2*>(to_v + column);
        const float2 before_k = *at_k, before_v = *at_v;
        *at_k = make_float2(before_k.x + dk[i][j][h * 2] * p.scale, before_k.y + dk[i][j][h * 2 + 1] * p.scale);
        *at_v = make_float2(before_v.x + dv[i][j][h * 2], before_v.y + dv[i][j][h * 2 + 1]);
      }
    }
}

/* Writes half `h` (rows lane / 4 + 8 h) of a 16 x HD accumulator, times `factor`, as bf16 into a row of memory; `to` null: this row does not exist. */
template <int HD>
__device__ __forceinline__ void store_row(bf16* to, const float (&acc)[HD / 8][4], int h, float factor, int dim) {
#pragma unroll
  for (int j = 0; j < HD / 8; j += 4) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) packed[i] = pack(acc[j + i][h * 2] * factor, acc[j + i][h * 2 + 1] * factor);
    transpose_quad(packed);
    const int column = (j + static_cast<int>(threadIdx.x & 3)) * 8;
    if (to != nullptr && column < dim) *reinterpret_cast<uint4*>(to + column) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

template <class K, class P>
int launch(K* kernel, int64_t blocks, int threads, int bytes, const P& p, void* stream) {
  if (blocks == 0) return 0;
  if (const int error = allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes)) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace attention::cuda
#endif
