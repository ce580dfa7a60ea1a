/* AdamW and the gradient norm over lists of tensors. Plain C++: no napi. */
#ifndef LC_QLORA_OPTIM_H
#define LC_QLORA_OPTIM_H
#include <cstdint>
#include <vector>

namespace lc_qlora {

/* Elements that one task works on; a tensor's tasks start at its own chunk, so results do not depend on the list around it. */
constexpr int64_t kChunk = 16384;
/* Elements that share one scale in 8-bit states. */
constexpr int64_t kStateBlock = 256;

/* One tensor. 32-bit states: m, v. 8-bit states: m8, v8 with a scale for every 256 elements. */
struct AdamSegment {
  float* value = nullptr;
  const float* grad = nullptr;
  int64_t n = 0;
  float* m = nullptr;
  float* v = nullptr;
  uint8_t* m8 = nullptr;
  uint8_t* v8 = nullptr;
  float* m_scale = nullptr;
  float* v_scale = nullptr;
};

struct AdamStep {
  std::vector<AdamSegment> segments;
  float beta1, beta2;
  float rest1, rest2; /* 1 - beta, rounded once from f64 as torch does */
  float eps;
  float decay;      /* 1 - lr * weightDecay */
  float step_size;  /* lr / (1 - beta1^t) */
  float root_bias2; /* sqrt(1 - beta2^t) */
  float grad_scale; /* of clipping */
};
void adamw(const AdamStep& p);

/* sqrt of the sum of squares, in f64 and in a fixed order. NaN or infinite when a gradient is. */
double grad_norm(const std::vector<AdamSegment>& segments);

}  // namespace lc_qlora
#endif
