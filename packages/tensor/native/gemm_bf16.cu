/* Chooses the kernel and the tile of a bf16 GEMM; tiles of 128 x 128. */
#include "gemm_bf16.cuh"
#include "gemm_choice.h"

namespace lctx::cuda {

uint32_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1) return 1;
  return static_cast<uint32_t>(count);
}

GemmChoice gemm_choice() {
  const char* wish = std::getenv("LCTX_GEMM");
  if (!wish || !*wish) return GemmChoice::best;
  return std::strcmp(wish, "portable") == 0 ? GemmChoice::portable : std::strcmp(wish, "hopper") == 0 ? GemmChoice::hopper : std::strcmp(wish, "cublaslt") == 0 ? GemmChoice::cublaslt : GemmChoice::unknown;
}

int launch_gemm_bf16_small(const GemmLaunch& p, cudaStream_t stream) { return launch_gemm_layouts<GemmSmall, gemm_detail::Copies::kExact>(p, stream); }

int launch_gemm_bf16(GemmLaunch p, void* stream) {
  if (p.m == 0 || p.n == 0 || (p.offsets != nullptr && p.experts == 0)) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const auto aligned = [](const void* q, int64_t ld, int64_t stride) { return reinterpret_cast<uintptr_t>(q) % 16 == 0 && ld % 8 == 0 && stride % 8 == 0; };
  p.vector_c = aligned(p.c, p.ldc, p.stride_c) && (p.splits <= 1 || p.m * p.n % 8 == 0);
  if (!aligned(p.a, p.lda, 0) || !aligned(p.b, p.ldb, p.stride_b)) return launch_gemm_bf16_elements(p, s);
  if (gemm_choice() != GemmChoice::portable && gemm_hopper_takes(p)) return launch_gemm_bf16_hopper(p, s);
  if (!gemm_chunks_exact(p)) return launch_gemm_bf16_chunks(p, s);
  // Large tiles once they fill the card, counting what partial tiles waste.
  const int64_t products = p.offsets == nullptr ? (p.splits > 1 ? p.splits : 1) : p.experts, m = p.offsets != nullptr && p.mode == 0 ? p.m / products : p.m;
  const int64_t rows = (m + GemmLarge::BM - 1) / GemmLarge::BM, tiles = rows * ((p.n + GemmLarge::BN - 1) / GemmLarge::BN) * products;
  const int64_t limit = shared_memory_limit();
  if (limit < GemmLarge::SMEM || tiles < multiprocessors() * 4 / 5 || m * 10 < rows * GemmLarge::BM * 7) return launch_gemm_bf16_small(p, s);
  return limit < GemmDeep::SMEM ? launch_gemm_bf16_large(p, s) : launch_gemm_bf16_deep(p, s);
}

}  // namespace lctx::cuda
