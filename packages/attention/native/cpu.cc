/* Cuts a pass into units of work and hands them to threads. A unit's result depends on shapes alone, never on which thread runs it or when. */
#include <atomic>
#include <cmath>
#include <cstring>
#include "attention.h"

namespace attention {
namespace {

template <class F>
void parallel(const lctx_api* api, int64_t count, int64_t grain, F&& fn) {
  using Fn = std::remove_reference_t<F>;
  api->parallel_for(0, count, grain, [](void* ctx, int64_t begin, int64_t end) { (*static_cast<Fn*>(ctx))(begin, end); },
                    const_cast<void*>(static_cast<const void*>(&fn)));
}

/* Units are taken from a counter, dearest first, by `slots` workers that each own a piece of scratch. */
template <class F>
void each_unit(const lctx_api* api, int64_t slots, int64_t units, float* scratch, int64_t floats, F&& fn) {
  std::atomic<int64_t> next{0};
  parallel(api, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot++)
      for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) fn(unit, scratch + slot * floats);
  });
}

const Kernels* best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return &kernels_avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return &kernels_avx2;
#endif
  return &kernels_generic;
}
std::atomic<const Kernels*> chosen{nullptr};
const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) chosen.store(k = best(), std::memory_order_relaxed);
  return *k;
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/* Cuts the visible keys into ranges of about equal work (queries that see them), at multiples of kKeys from the first. Returns how many. */
int64_t cut_segments(const Problem& p, int64_t want, KeyRange* out) {
  const int64_t begin = first_key(p, 0), end = p.start + p.n;
  auto work = [&](int64_t key, int64_t& last) -> double {  // queries that see `key`: a contiguous range; `last` moves on with the key
    int64_t stop = p.n;
    if (p.window > 0 && key - p.start + p.window < stop) stop = key - p.start + p.window;
    while (last < stop && first_key(p, last) <= key) last++;
    const int64_t first = key > p.start ? key - p.start : 0;
    const int64_t seen = (last < stop ? last : stop) - first;
    return seen > 0 ? static_cast<double>(seen + 1) : 1.0;
  };
  double total = 0, done = 0;
  int64_t last = 0;
  for (int64_t key = begin; key < end; key += kKeys) total += work(key, last);
  int64_t count = 0;
  last = 0;
  out[0].begin = begin;
  for (int64_t key = begin; key < end; key += kKeys) {
    const double here = work(key, last), target = total * static_cast<double>(count + 1) / static_cast<double>(want);
    if (count + 1 < want && key > out[count].begin && done + here / 2 >= target) {  // the nearer of the two cuts around the target
      out[count].end = key;
      out[++count].begin = key;
    }
    done += here;
  }
  out[count].end = end;
  return count + 1;
}

}  // namespace

const char* isa() { return kernels().name; }
bool use_isa(const char* name) {
  const Kernels* k = nullptr;
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("x86-64-v4")) k = &kernels_avx512;
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("x86-64-v3")) k = &kernels_avx2;
#endif
  if (!std::strcmp(name, "generic")) k = &kernels_generic;
  if (!k) return false;
  chosen = k;
  return true;
}

int64_t forward_scratch(int64_t dim) { return round_up(kLanes * dim * 2 + kKeys * kLanes + kKeys * dim * 2, 64); }
int64_t backward_scratch(int64_t dim) {
  const int64_t padded = round_up(dim, 16);
  return round_up(kLanes * dim * 3 + kLanes * padded * 2 + kKeys * kLanes * 2 + kKeys * dim * 2 + kKeys * padded, 64);
}

int64_t check_doc_start(const int32_t* doc_start, int64_t n, int64_t start) {
  for (int64_t i = 0; i < n; i++)
    if (doc_start[i] < (i ? doc_start[i - 1] : 0) || doc_start[i] > start + i) return i;
  return -1;
}

void forward(const Forward& f, const lctx_api* api) {
  if (f.p.n == 0) return;
  const Kernels& k = kernels();
  const Tiling t(f.p);
  const int64_t per_tile = f.p.kv_heads * t.head_blocks;
  each_unit(api, f.slots, t.tiles * per_tile, f.scratch, forward_scratch(f.p.dim), [&](int64_t unit, float* scratch) {
    const int64_t tile = t.tiles - 1 - unit / per_tile, group = unit % per_tile;
    k.forward_tile(f, t, group / t.head_blocks, group % t.head_blocks, tile, scratch);
  });
}

void backward(const Backward& b, const lctx_api* api) {
  const Problem& p = b.p;
  if (p.n == 0) return;
  const Kernels& k = kernels();
  const Tiling t(p);
  parallel(api, p.n, 16, [&](int64_t begin, int64_t end) { k.delta(b, begin, end); });

  if (b.dsinks) {
    parallel(api, p.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; h++) {
        double sum = 0;
        for (int64_t i = 0; i < p.n; i++)
          sum += std::exp(static_cast<double>(p.sinks[h]) - b.lse[i * p.heads + h]) * b.delta[i * p.heads + h];
        b.dsinks[h] -= static_cast<float>(sum);
      }
    });
  }

  KeyRange segments[kMaxSegments];
  const int64_t count = cut_segments(p, b.segments, segments);
  const int64_t row = p.heads * p.dim;
  each_unit(api, b.slots, p.kv_heads * count, b.scratch, backward_scratch(p.dim), [&](int64_t unit, float* scratch) {
    const int64_t s = unit / p.kv_heads;
    float* dq = s == 0 ? b.dq : b.partial + (s - 1) * p.n * row;
    k.backward_segment(b, t, unit % p.kv_heads, segments[s], dq, s == 0 ? b.dq_stride : row, scratch);
  });

  // dQ = the sum over segments, in their order; a segment that a tile does not see has written nothing.
  parallel(api, t.tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      const KeyRange keys = tile_keys(p, t, tile);
      for (int64_t i = tile * t.queries; i < p.n && i < (tile + 1) * t.queries; i++) {
        float* to = b.dq + i * b.dq_stride;
        if (keys.begin >= segments[0].end || keys.end <= segments[0].begin)
          for (int64_t x = 0; x < row; x++) to[x] = 0.0f;
        for (int64_t s = 1; s < count; s++) {
          if (keys.begin >= segments[s].end || keys.end <= segments[s].begin) continue;
          const float* from = b.partial + ((s - 1) * p.n + i) * row;
          for (int64_t x = 0; x < row; x++) to[x] += from[x];
        }
      }
    }
  });
}

}  // namespace attention
