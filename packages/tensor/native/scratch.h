/* Memory that a thread keeps: grown when a call needs more, freed when the thread ends. For sizes bounded by blocking, not by the input. */
#ifndef LCTX_SCRATCH_H
#define LCTX_SCRATCH_H
#include <cstdint>
#include <cstdlib>

namespace lctx::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(p_); }
  /* 64-byte aligned; what it held is lost. */
  float* get(int64_t floats) {
    if (floats > size_) {
      std::free(p_);
      size_ = (floats + 15) / 16 * 16;
      p_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(size_) * sizeof(float)));
      if (!p_) std::abort();  // a few MiB, once per thread
    }
    return p_;
  }

 private:
  float* p_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace lctx::cpu
#endif
