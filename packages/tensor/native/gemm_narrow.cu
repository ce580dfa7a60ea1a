/* Which products are narrow, and into how many pieces the gradients among them are cut. */
#include "gemm_narrow.cuh"

namespace lctx::cuda {
namespace {

enum class Kind { kNone, kRows, kUpdate, kGradient };

Kind kind_of(const GemmLaunch& p, bool a_f32, bool b_f32) {
  if (p.trans_a) {
    const int64_t rank = a_f32 ? p.m : p.n;
    return !p.trans_b && a_f32 != b_f32 && rank <= 64 ? Kind::kGradient : Kind::kNone;
  }
  if (!b_f32) return Kind::kNone;
  if (!a_f32) return p.n <= 128 ? Kind::kRows : Kind::kNone;
  return p.k <= 64 ? Kind::kUpdate : Kind::kNone;
}

}  // namespace

bool launch_gemm_narrow(const GemmLaunch& p, bool a_f32, bool b_f32, void* stream, int* status) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (kind_of(p, a_f32, b_f32)) {
    case Kind::kRows: *status = narrow::launch_rows(p, s); return true;
    case Kind::kUpdate: *status = narrow::launch_update(p, s); return true;
    case Kind::kGradient: *status = narrow::launch_gradient(p, a_f32, s); return true;
    default: return false;
  }
}

/* Pieces of k that fill a card with blocks of 64 columns. 0: not a narrow gradient. */
int32_t gemm_narrow_splits(const GemmLaunch& p, bool a_f32, bool b_f32) {
  if (kind_of(p, a_f32, b_f32) != Kind::kGradient) return 0;
  const int64_t width = a_f32 ? p.n : p.m, rank = a_f32 ? p.m : p.n;
  const int64_t tiles = (width + 63) / 64 * ((rank + 31) / 32), wanted = 264 / tiles, most = p.k / 256;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 2 ? 1 : splits > 64 ? 64 : static_cast<int32_t>(splits);
}

}  // namespace lctx::cuda
