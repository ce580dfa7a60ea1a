/* What the process takes of one device, as the driver counts it, and the most that it may. Used by cuda_rt.cc, which serialises the calls. */
#ifndef LCTX_DEVICE_BUDGET_H
#define LCTX_DEVICE_BUDGET_H
#include <cstdint>

namespace lctx::cuda {

/* Who counts. */
enum Source : int32_t {
  kProcess = 1, /* NVML, this process alone */
  kDevice = 2,  /* NVML: in use now less what was in use before our context; what others take later is counted as ours */
  kAll = 3,     /* no NVML: everything in use on the device */
};

class DeviceBudget {
 public:
  /* Around the creation of the context. */
  void before_context(int device);
  void after_context(int device);

  /* Asks the driver. `reserved`: what our pool holds. */
  void sample(uint64_t reserved);
  void reset_peak(uint64_t reserved);

  bool exceeds(uint64_t reserved) const { return limit && outside_ + reserved > limit; }
  uint64_t taken(uint64_t reserved) const { return outside_ + reserved; }
  /* Taken besides the pool: context, kernels, cuBLASLt. */
  uint64_t outside() const { return outside_; }
  uint64_t peak() const { return peak_; }
  Source source() const { return source_; }

  uint64_t limit = 0; /* 0: none */

 private:
  bool driver_bytes(uint64_t* out) const;

  int device_ = 0;
  unsigned pid_ = 0; /* ours in the driver's numbering: inside a container not what getpid() says */
  uint64_t others_ = 0;
  uint64_t outside_ = 0, peak_ = 0;
  Source source_ = kAll;
  bool had_nvml_ = false;
};

}  // namespace lctx::cuda
#endif
