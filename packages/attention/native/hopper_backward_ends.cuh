/* Before and after Hopper's backward kernel: rows of lse and delta as it reads them, and dQ from f32 sums to bf16. */
#ifndef LC_ATTENTION_HOPPER_BACKWARD_ENDS_CUH
#define LC_ATTENTION_HOPPER_BACKWARD_ENDS_CUH
#include "tiles.cuh"

namespace attention::cuda {

struct BackwardPrepare {
  Backward b;
  float *lse, *delta; /* by head, padded: see HopperBackward */
  int *low, *zeros;   /* low: see HopperBackward; `zeros`: `zero_count` ints to clear */
  int64_t zero_count;
  int tiles, queries, keys; /* tiles of queries; queries and keys of a tile */
};
constexpr int kPrepareHeads = 8; /* of a block: one a lane of eight */

/* Per tile of queries the first tile of keys, made non-decreasing whatever doc_start holds: the turns rely on it. By a block; `most`: an int a thread. */
__device__ __forceinline__ void first_key_tiles(const BackwardPrepare& a, int* most) {
  const int threads = blockDim.x, thread = threadIdx.x, each = (a.tiles + threads - 1) / threads, begin = thread * each, end = min(a.tiles, begin + each);
  int top = 0;
  for (int i = begin; i < end; i++) top = max(top, first_key(a.b.p, i * a.queries) / a.keys);
  most[thread] = top;
  __syncthreads();
  for (int step = 1; step < threads; step *= 2) {  // prefix maximum (Hillis and Steele 1986)
    const int other = thread >= step ? most[thread - step] : 0;
    __syncthreads();
    most[thread] = max(most[thread], other);
    __syncthreads();
  }
  top = thread > 0 ? most[thread - 1] : 0;
  for (int i = begin; i < end; i++) {
    top = max(top, first_key(a.b.p, i * a.queries) / a.keys);
    a.low[i] = top;
  }
}

/* out . dout of a row and eight heads, by eight lanes: 16 bytes each of up to 128 dims. Returns the sum of the head that is the lane's. */
__device__ __forceinline__ float row_deltas(const bf16* out, const bf16* dout, int dim, int count) {
  const int lane = threadIdx.x % 8;
  float sum[8] = {};
#pragma unroll
  for (int x0 = 0; x0 < 128; x0 += 64) {
    if (x0 >= dim) break;
    const int x = x0 + lane * 8;
    uint4 u[8], w[8];
#pragma unroll
    for (int h = 0; h < 8; h++) {
      const bool valid = h < count && x < dim;
      u[h] = valid ? *reinterpret_cast<const uint4*>(out + h * dim + x) : make_uint4(0, 0, 0, 0);
      w[h] = valid ? *reinterpret_cast<const uint4*>(dout + h * dim + x) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int h = 0; h < 8; h++) {
      const uint32_t a[4] = {u[h].x, u[h].y, u[h].z, u[h].w}, g[4] = {w[h].x, w[h].y, w[h].z, w[h].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[h] += __uint_as_float(a[i] << 16) * __uint_as_float(g[i] << 16);
        sum[h] += __uint_as_float(a[i] & 0xffff0000u) * __uint_as_float(g[i] & 0xffff0000u);
      }
    }
  }
#pragma unroll
  for (int o = 4; o; o >>= 1)  // a lane keeps the heads that agree with it in bit o
#pragma unroll
    for (int h = 0; h < o; h++) {
      const bool upper = lane & o;
      const float keep = upper ? sum[h + o] : sum[h], give = upper ? sum[h] : sum[h + o];
      sum[h] = keep + __shfl_xor_sync(~0u, give, o);
    }
  return sum[0];
}

/* Block (part, y): delta = rowsum(dout * out) of part `part` of the queries and 8 heads, lse in base 2, both by head and padded to whole tiles with rows of probability 0; and the
 * part's sum of exp(sink - lse) * delta, in a fixed order. Block (kSinkParts, 0): `low`. All clear `zeros`. */
__global__ void __launch_bounds__(256) prepare_kernel(const __grid_constant__ BackwardPrepare a) {
  __shared__ union { int most[256]; float sums[8][kPrepareHeads]; } shared;
  const Backward& b = a.b;
  const int thread = threadIdx.x, part = blockIdx.x, head0 = static_cast<int>(blockIdx.y) * kPrepareHeads, heads = b.p.heads;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  for (int64_t i = block * 256 + thread; i < a.zero_count; i += static_cast<int64_t>(gridDim.x) * gridDim.y * 256) a.zeros[i] = 0;
  if (part == kSinkParts) {
    if (blockIdx.y == 0) first_key_tiles(a, shared.most);
    return;
  }
  const int64_t padded = static_cast<int64_t>(a.tiles) * a.queries, units = padded / 32;
  const int begin = static_cast<int>(units * part / kSinkParts), end = static_cast<int>(units * (part + 1) / kSinkParts);
  const int count = min(kPrepareHeads, heads - head0), lane = thread % 8, head = head0 + lane;
  const bool mine = lane < count;
  const float sink = b.dsinks != nullptr && mine ? b.p.sinks[head] * kLog2e : 0;
  float sum = 0;
  for (int query = begin * 32 + thread / 8; query < end * 32; query += 32) {
    const bool valid = query < b.p.n;
    const int64_t row = valid ? query : 0, first = static_cast<int64_t>(head0) * b.p.dim;
    const float lse = valid && mine ? b.lse[row * heads + head] * kLog2e : INFINITY;
    const float delta = row_deltas(static_cast<const bf16*>(b.out) + row * b.out_stride + first, static_cast<const bf16*>(b.dout) + row * b.dout_stride + first, b.p.dim, valid ? count : 0);
    if (mine) a.lse[head * padded + query] = lse, a.delta[head * padded + query] = delta;
    sum += exp2f(sink - lse) * delta;
  }
  if (b.dsinks == nullptr) return;
  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 16);
  if (thread % 32 < kPrepareHeads) shared.sums[thread / 32][lane] = sum;
  __syncthreads();
  if (thread >= count) return;
  sum = 0;
  for (int warp = 0; warp < 8; warp++) sum += shared.sums[warp][thread];
  b.sink_partial[static_cast<int64_t>(part) * heads + head] = sum;
}

/* 32 columns of 16 rows of dQ, by a warp: as the accumulators of 64 rows lie, [HD / 8 blocks of 8 columns][128 threads] float4. */
struct QueryGradient {
  float4 v[4];
  template <int HD>
  static constexpr int parts() { return 4 * (HD / 32); }
  template <int HD>
  __device__ __forceinline__ void load(const float* piece, int part) {
    const float4* from = reinterpret_cast<const float4*>(piece) + part % (HD / 32) * 4 * 128 + part / (HD / 32) * 32 + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __ldcg(from + i * 128);
  }
  /* Times scale, as bf16; `to`: the piece's first row, of `rows`. */
  template <int HD>
  __device__ __forceinline__ void store(bf16* to, int64_t stride, int part, int rows, int dim, float scale) {
    uint32_t upper[4], lower[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      upper[i] = pack(v[i].x * scale, v[i].y * scale);
      lower[i] = pack(v[i].z * scale, v[i].w * scale);
    }
    transpose_quad(upper);
    transpose_quad(lower);
    const int lane = threadIdx.x % 32, row = part / (HD / 32) * 16 + lane / 4, column = part % (HD / 32) * 32 + lane % 4 * 8;
    if (column >= dim) return;
    to += row * stride + column;
    if (row < rows) *reinterpret_cast<uint4*>(to) = make_uint4(upper[0], upper[1], upper[2], upper[3]);
    if (row + 8 < rows) *reinterpret_cast<uint4*>(to + 8 * stride) = make_uint4(lower[0], lower[1], lower[2], lower[3]);
  }
};

/* All of dQ, where no block of the kernel knows that it is complete. A block: 64 rows of a head. */
template <int HD>
__global__ void __launch_bounds__(128) dq_kernel(const float* sum, bf16* dq, int64_t stride, int n, int pieces, int dim, float scale) {
  const int piece = blockIdx.x, head = blockIdx.y;
  const float* from = sum + (static_cast<int64_t>(head) * pieces + piece) * 64 * HD;
  bf16* to = dq + int64_t{64} * piece * stride + static_cast<int64_t>(head) * dim;
#pragma unroll
  for (int part = threadIdx.x / 32; part < QueryGradient::parts<HD>(); part += 4) {
    QueryGradient x;
    x.load<HD>(from, part);
    x.store<HD>(to, stride, part, n - piece * 64, dim, scale);
  }
}

}  // namespace attention::cuda
#endif
