/* Attention's arrays as Hopper's copy engine sees them. */
#ifndef LC_ATTENTION_HOPPER_MAP_CUH
#define LC_ATTENTION_HOPPER_MAP_CUH
#include "lctx/hopper.cuh"

namespace attention::cuda {

/* [tokens, heads, dim] in bf16, heads and dims packed, `stride` elements from token to token; a copy takes 64 dims of `box_heads` heads of `box_tokens` tokens. Returns a cudaError_t. */
inline int token_map(CUtensorMap* map, const void* x, int64_t tokens, int64_t heads, int64_t dim, int64_t stride, int box_tokens, int box_heads = 1) {
  const auto u = [](int64_t y) { return static_cast<uint64_t>(y); };
  const uint64_t sizes[3] = {u(dim), u(heads), u(tokens)}, strides[2] = {u(dim) * 2, u(stride) * 2}; /* bytes */
  const uint32_t box[3] = {64, static_cast<uint32_t>(box_heads), static_cast<uint32_t>(box_tokens)};
  return lctx::cuda::tensor_map(map, x, 3, sizes, strides, box);
}

}  // namespace attention::cuda
#endif
