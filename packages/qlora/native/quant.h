/* 4-bit formats. Plain C++: no napi. All pointers are CPU memory. */
#ifndef LC_QLORA_QUANT_H
#define LC_QLORA_QUANT_H
#include <cstdint>

namespace lc_qlora {

/* The 16 levels of NF4 (QLoRA, appendix E; the values bitsandbytes publishes), rising. */
extern const float kNf4[16];
/* E2M1 (OCP Microscaling 1.0): 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives. */
extern const float kE2m1[16];
/* An NF4 code that decodes to zero. */
constexpr int kNf4Zero = 7;
constexpr int64_t kMaxBlock = 4096;
/* Scales quantised together by double quantization. */
constexpr int64_t kScaleBlock = 256;
constexpr int64_t kMxBlock = 32;

/* x[n] (f32, bf16 or f16 by `dtype`) -> codes[ceil(n / 2)], first element in the high nibble; absmax[ceil(n / block)]. */
struct Nf4Quantize {
  const void* x;
  int32_t dtype;
  int64_t n, block;
  uint8_t* codes;
  float* absmax;
};
/* Returns false when a value is not finite. */
bool nf4_quantize(const Nf4Quantize& p);

/* absmax[n] -> codes[n] and scales[ceil(n / 256)] of absmax - offset in the signed dynamic map, offset = mean(absmax). */
struct DoubleQuantize {
  const float* absmax;
  int64_t n;
  uint8_t* codes;
  float* scales;
  float* offset;
};
void double_quantize(const DoubleQuantize& p);

/* NF4 -> out[n], f32 or bf16. Block b's scale is absmax[b], or, where absmax is null, map[codes2[b]] * scales[b / 256] + *offset. */
struct Nf4Dequantize {
  const uint8_t* codes;
  int64_t n, block;
  const float* absmax;
  const uint8_t* codes2;
  const float* scales;
  const float* offset;
  void* out;
  int32_t out_dtype;
};
void nf4_dequantize(const Nf4Dequantize& p);

/* MXFP4: blocks[n / 2] (low nibble first), scales[n / 32] (E8M0: 2^(byte - 127), 255 = NaN); n is a multiple of 32. */
struct Mxfp4 {
  uint8_t* blocks;
  uint8_t* scales;
  int64_t n;
  void* values;
  int32_t dtype; /* quantize: f32, bf16, f16; dequantize: f32, bf16 */
};
bool mxfp4_quantize(const Mxfp4& p); /* false when a value is not finite */
void mxfp4_dequantize(const Mxfp4& p);

/* Decodes n elements of packed 4-bit codes through a 16-entry table, times scale. n is a multiple of 32 but for the last call of a tensor. */
void decode4(const uint8_t* codes, int64_t n, const float* table, float scale, bool high_first, float* out);

/* f32 -> bf16, to nearest even. */
void narrow(const float* x, int64_t n, uint16_t* out);

}  // namespace lc_qlora
#endif
