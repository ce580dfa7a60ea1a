/* Exact causal attention of a query chunk over a K/V prefix, on the CPU. Plain C++: no napi, no tensors, no allocation.
 *
 * Query i of the chunk sits at index start + i and sees the keys max(docStart[i], start + i - window + 1) .. start + i.
 * Layout: q [n, Hq, D], k and v [T, Hkv, D]; row strides in elements; heads and head dims packed; query head h reads K/V head h / (Hq / Hkv). */
#ifndef LC_ATTENTION_H
#define LC_ATTENTION_H
#include <cstdint>
#include "lctx/abi.h"

namespace attention {

constexpr int kLanes = 64;       // (query, head) pairs of one tile
constexpr int kKeys = 64;        // keys of one tile
constexpr int kMaxSegments = 8;  // key ranges that the backward pass splits dK, dV into

/* What both passes share. */
struct Problem {
  int64_t n, heads, kv_heads, dim, start;
  int64_t window;            // keys visible to a query, itself included; <= 0: no window
  float scale;
  const int32_t* doc_start;  // [n] or null (one document from 0); non-decreasing, 0 <= doc_start[i] <= start + i
  const float* sinks;        // [heads] or null
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // elements between tokens
};

struct Forward {
  Problem p;
  float* out;
  int64_t out_stride;
  float* lse;  // [n, heads], natural log, sink included
  float* scratch;
  int64_t slots;  // scratch holds this many times forward_scratch(dim) floats; at most so many threads work
};

struct Backward {
  Problem p;
  const float *out, *dout, *lse;
  int64_t out_stride, dout_stride;
  float* dq;  // overwritten
  int64_t dq_stride;
  float *dk, *dv;  // added to
  int64_t dk_stride, dv_stride;
  float* dsinks;    // [heads], added to; or null
  float* delta;     // [n, heads] scratch: rowsum(dout * out)
  float* partial;   // [segments - 1, n, heads, dim] scratch: dQ of the key segments 1..
  int64_t segments; // 1..kMaxSegments; chosen from shapes alone, so that sums have one order whatever the number of threads
  float* scratch;
  int64_t slots;
};

/* Floats of scratch per slot. */
int64_t forward_scratch(int64_t dim);
int64_t backward_scratch(int64_t dim);

/* The first i with an invalid doc_start[i], or -1. */
int64_t check_doc_start(const int32_t* doc_start, int64_t n, int64_t start);

void forward(const Forward& f, const lctx_api* api);
void backward(const Backward& b, const lctx_api* api);

/* "avx512", "avx2" or "generic": which build of the kernels this machine runs. */
const char* isa();
/* For tests: another build, if this machine can run it. Not while a pass runs. */
bool use_isa(const char* name);

// ---- shared by cpu.cc and the kernels ---------------------------------------------------------------------------------------------

/* The heads of one K/V group are cut into blocks of at most kLanes, and the queries into tiles, so that a tile has up to kLanes lanes.
 * lane = query * block + head: neighbouring lanes see neighbouring key ranges, and lie side by side in memory. */
struct Tiling {
  int64_t group, head_blocks, heads_per_block, queries, tiles;
  explicit Tiling(const Problem& p) {
    group = p.heads / p.kv_heads;
    head_blocks = (group + kLanes - 1) / kLanes;
    heads_per_block = (group + head_blocks - 1) / head_blocks;
    queries = kLanes / heads_per_block;
    tiles = (p.n + queries - 1) / queries;
  }
};

inline int64_t first_key(const Problem& p, int64_t i) {
  int64_t lo = p.doc_start ? p.doc_start[i] : 0;
  if (p.window > 0 && p.start + i - p.window + 1 > lo) lo = p.start + i - p.window + 1;
  return lo;
}
/* Keys that any query of tile t sees: begin .. end. first_key does not decrease with i. */
struct KeyRange { int64_t begin, end; };
inline KeyRange tile_keys(const Problem& p, const Tiling& t, int64_t tile) {
  const int64_t q0 = tile * t.queries, q1 = q0 + t.queries < p.n ? q0 + t.queries : p.n;
  return {first_key(p, q0), p.start + q1};
}

struct Kernels {
  const char* name;
  void (*forward_tile)(const Forward& f, const Tiling& t, int64_t kv_head, int64_t head_block, int64_t tile, float* scratch);
  void (*delta)(const Backward& b, int64_t begin, int64_t end);  // queries begin .. end
  /* dK, dV of the keys begin .. end of one K/V head, and this range's share of dQ of the heads it serves, into dq. */
  void (*backward_segment)(const Backward& b, const Tiling& t, int64_t kv_head, KeyRange keys, float* dq, int64_t dq_stride, float* scratch);
};
extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace attention
#endif
