/* Packing for the x86 kernels: 8 x 8 transposes in registers. Included like gemm_kernels.h, after `Vec`. */

/* Rows of src become lanes: columns k0 .. k0+8 of 8 rows. Rows from `valid` on are zero. */
LCTX_INLINE void transpose8(const float* src, int64_t ld, int64_t valid, __m256 (&out)[8]) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = i < valid ? _mm256_loadu_ps(src + i * ld) : _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[4 * i + 0] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    out[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
}

/* Up to 16 rows at once, so that stores of 8 lanes may run over into the next k's place, which is written after. Wider panels (of b) come in
 * whole groups of 16 but for the last. */
template <int Groups, bool Whole>
LCTX_INLINE void pack_rows(const float* src, int64_t ld, int64_t rows, int64_t k, float* dst, int64_t stride) {
  int64_t p = 0;
  for (; p + 8 <= k; p += 8) {
    __m256 v[Groups][8];
#pragma GCC unroll 2
    for (int g = 0; g < Groups; g++) transpose8(src + 8 * g * ld + p, ld, Whole ? 8 : rows - 8 * g, v[g]);
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
#pragma GCC unroll 2
      for (int g = 0; g < Groups; g++) _mm256_storeu_ps(dst + (p + q) * stride + 8 * g, v[g][q]);
    }
  }
  for (; p < k; p++)
    for (int64_t i = 0; i < rows; i++) dst[p * stride + i] = src[i * ld + p];
}
void pack_transposed(const float* src, int64_t ld, int64_t rows, int64_t k, float* dst, int64_t stride) {
  // The overrun of one group of 16 would hit the first lanes of the next group's place only if the stride is wider than 16: then it is whole.
  for (; rows >= 16; rows -= 16, src += 16 * ld, dst += 16) pack_rows<2, true>(src, ld, 16, k, dst, stride);
  if (rows > 8) pack_rows<2, false>(src, ld, rows, k, dst, stride);
  else if (rows == 8) pack_rows<1, true>(src, ld, 8, k, dst, stride);
  else if (rows > 0) pack_rows<1, false>(src, ld, rows, k, dst, stride);
}
void pack_straight(const float* src, int64_t ld, int64_t count, int64_t k, float* dst, int64_t stride) {
  const int64_t whole = count / Vec::kWidth * Vec::kWidth;
  const int32_t tail = static_cast<int32_t>(count - whole);
  for (int64_t p = 0; p < k; p++, src += ld, dst += stride) {
    for (int64_t i = 0; i < whole; i += Vec::kWidth) Vec::store(dst + i, Vec::load(src + i));
    if (tail) Vec::store(dst + whole, Vec::load(src + whole, tail));  // a whole store: what runs over is written later, or slack
  }
}
