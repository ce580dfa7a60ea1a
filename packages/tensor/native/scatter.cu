/* Gradient of an embedding: rows of dout added to the table's rows of their ids, in an order that the ids alone fix. Tokens are ranked by id, stably; a block then adds up
 * SEGMENT of them that follow each other, and what belongs to an id whose tokens fill more than one segment is joined in order: an id of thousands of tokens
 * takes as long as thousands of ids. */
#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "rows.cuh"

namespace lctx::cuda {
namespace {

constexpr int64_t PIECE = 16384; /* tokens at a time: ranking them costs their number squared */
constexpr int SEGMENT = 32;
constexpr int RANK_TOKENS = 64, RANK_PARTS = 4, TILE = 2048;
constexpr int COLUMN_THREADS = 128;

__device__ __forceinline__ int32_t key(const EmbeddingLaunch& p, int64_t token) {
  const int32_t id = p.ids[token];
  return id >= 0 && id < p.vocab ? id : INT32_MAX;  // no row: last, and left out
}

/* order[rank of token i] = i. A block ranks 64 tokens, each by four threads that look at a quarter of every tile of ids. */
__global__ void __launch_bounds__(RANK_TOKENS * RANK_PARTS) rank_kernel(EmbeddingLaunch p, int64_t first, int32_t count, int32_t* order) {
  __shared__ __align__(16) int32_t tile[TILE];
  __shared__ int32_t ranks[RANK_PARTS][RANK_TOKENS];
  const int mine = threadIdx.x % RANK_TOKENS, part = threadIdx.x / RANK_TOKENS;
  const int32_t token = blockIdx.x * RANK_TOKENS + mine;
  const int32_t id = token < count ? key(p, first + token) : INT32_MAX;
  int32_t rank = 0;
  for (int32_t base = 0; base < count; base += TILE) {
    __syncthreads();
    for (int i = threadIdx.x; i < TILE; i += RANK_TOKENS * RANK_PARTS) tile[i] = base + i < count ? key(p, first + base + i) : INT32_MAX;
    __syncthreads();
    const int from = part * (TILE / RANK_PARTS);
    const int32_t at = base + from;
    if (at + TILE / RANK_PARTS <= token || at > token) {
      // All of them before the token, where equal ids come first, or all behind it. (INT32_MAX + 1 is never needed: what is behind `count` is behind the token.)
      const bool before = at <= token;
#pragma unroll 4
      for (int i = 0; i < TILE / RANK_PARTS; i += 4) {
        const int4 x = *reinterpret_cast<const int4*>(tile + from + i);
        if (before) rank += (x.x <= id) + (x.y <= id) + (x.z <= id) + (x.w <= id);
        else rank += (x.x < id) + (x.y < id) + (x.z < id) + (x.w < id);
      }
    } else {
      for (int i = 0; i < TILE / RANK_PARTS; i++) rank += tile[from + i] < id || (tile[from + i] == id && at + i < token);
    }
  }
  ranks[part][mine] = rank;
  __syncthreads();
  if (part == 0 && token < count) {
    for (int i = 1; i < RANK_PARTS; i++) rank += ranks[i][mine];
    order[rank] = token;
  }
}

template <int N>
__device__ __forceinline__ void load_row(const RowTensor& t, int64_t i, float (&v)[N]) {
  if constexpr (N == 8) load8(t, i, v);
  else v[0] = load_any(t, i);
}
template <int N>
__device__ __forceinline__ void add_to(float* to, const float (&v)[N]) {
  if constexpr (N == 8) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float4* at = reinterpret_cast<float4*>(to) + h;
      const float4 x = *at;
      *at = make_float4(x.x + v[4 * h], x.y + v[4 * h + 1], x.z + v[4 * h + 2], x.w + v[4 * h + 3]);
    }
  } else {
    *to += v[0];
  }
}

/* partial: f32 [segments, 2, width]: the sum of a segment's last id where it goes on behind the segment, and of its first where it came from before it. */
template <int N>
__global__ void __launch_bounds__(COLUMN_THREADS) segment_kernel(EmbeddingLaunch p, int64_t first, int32_t count, const int32_t* order, float* partial) {
  __shared__ int32_t tokens[SEGMENT], ids[SEGMENT + 2];  // with a neighbour's on either side
  const int32_t base = blockIdx.x * SEGMENT, n = min(SEGMENT, count - base);
  for (int i = threadIdx.x; i < SEGMENT + 2; i += COLUMN_THREADS) {
    const int32_t at = base + i - 1;
    ids[i] = at >= 0 && at < count ? key(p, first + order[at]) : -1;
    if (i >= 1 && i <= n) tokens[i - 1] = order[at];
  }
  __syncthreads();
  const int64_t column = (blockIdx.y * static_cast<int64_t>(COLUMN_THREADS) + threadIdx.x) * N;
  if (column >= p.width) return;
  float* table = static_cast<float*>(p.table.data);
  float* mine = partial + blockIdx.x * 2ll * p.width + column;
  float sum[N] = {};
  bool whole = ids[0] != ids[1];  // the present id begins in this segment
  constexpr int AHEAD = 4;
  for (int i = 0; i < n; i += AHEAD) {
    float v[AHEAD][N];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (i + a < n && ids[i + a + 1] != INT32_MAX) load_row<N>(p.rows, (first + tokens[i + a]) * p.rows.ld + column, v[a]);
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      if (i + a >= n) break;
      const int32_t id = ids[i + a + 1];
      if (id == INT32_MAX) return;  // so are all behind it
#pragma unroll
      for (int e = 0; e < N; e++) sum[e] += v[a][e];
      const bool last = ids[i + a + 2] != id;
      if (!last && i + a + 1 < n) continue;
      if (whole && last) {
        add_to<N>(table + id * p.table.ld + column, sum);
      } else {
        float* to = mine + (whole ? 0 : p.width);
#pragma unroll
        for (int e = 0; e < N; e++) to[e] = sum[e];
      }
#pragma unroll
      for (int e = 0; e < N; e++) sum[e] = 0;
      whole = true;
    }
  }
}

/* The id that begins in segment blockIdx.x and goes on: its sums in order. */
template <int N>
__global__ void __launch_bounds__(COLUMN_THREADS) join_kernel(EmbeddingLaunch p, int64_t first, int32_t count, const int32_t* order, const float* partial) {
  const auto id_at = [&](int64_t at) { return at < count ? key(p, first + order[at]) : -1; };
  const int64_t base = blockIdx.x * static_cast<int64_t>(SEGMENT), end = base + SEGMENT;
  if (end >= count) return;
  const int32_t id = id_at(end - 1);
  if (id == INT32_MAX || id_at(end) != id || (base > 0 && id_at(base - 1) == id)) return;
  const int64_t column = (blockIdx.y * static_cast<int64_t>(COLUMN_THREADS) + threadIdx.x) * N;
  if (column >= p.width) return;
  const float* from = partial + blockIdx.x * 2ll * p.width + column;
  float sum[N];
#pragma unroll
  for (int e = 0; e < N; e++) sum[e] = from[e];
  // Segments that the id reaches: it is sorted, so the first that it does not fill is the last.
  int64_t segments = 1;
  while (id_at(end + (segments - 1) * SEGMENT + SEGMENT - 1) == id && id_at(end + segments * SEGMENT) == id) segments++;
#pragma unroll 4
  for (int64_t s = 1; s <= segments; s++)
#pragma unroll
    for (int e = 0; e < N; e++) sum[e] += from[s * 2 * p.width + p.width + e];
  add_to<N>(static_cast<float*>(p.table.data) + id * p.table.ld + column, sum);
}

int64_t piece_of(int64_t n) { return n < PIECE ? n : PIECE; }
int64_t segments_of(int64_t n) { return (piece_of(n) + SEGMENT - 1) / SEGMENT; }

template <int N>
int launch(const EmbeddingLaunch& p, void* scratch, cudaStream_t s) {
  auto* partial = static_cast<float*>(scratch);
  auto* order = reinterpret_cast<int32_t*>(partial + segments_of(p.n) * 2 * p.width);
  const auto across = static_cast<unsigned>((p.width + COLUMN_THREADS * N - 1) / (COLUMN_THREADS * N));
  for (int64_t first = 0; first < p.n; first += PIECE) {
    const auto count = static_cast<int32_t>(piece_of(p.n - first));
    const dim3 grid(static_cast<unsigned>((count + SEGMENT - 1) / SEGMENT), across);
    rank_kernel<<<static_cast<unsigned>((count + RANK_TOKENS - 1) / RANK_TOKENS), RANK_TOKENS * RANK_PARTS, 0, s>>>(p, first, count, order);
    segment_kernel<N><<<grid, COLUMN_THREADS, 0, s>>>(p, first, count, order, partial);
    join_kernel<N><<<grid, COLUMN_THREADS, 0, s>>>(p, first, count, order, partial);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t embedding_scatter_scratch(const EmbeddingLaunch& p) { return segments_of(p.n) * 2 * p.width * 4 + piece_of(p.n) * 4; }

int launch_embedding_scatter_add(const EmbeddingLaunch& p, void* scratch, void* stream) {
  if (p.width == 0 || p.n == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  return vectors(p.rows, p.width) && vectors(p.table, p.width) ? launch<8>(p, scratch, s) : launch<1>(p, scratch, s);
}

}  // namespace lctx::cuda
