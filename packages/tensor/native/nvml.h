/* NVML, the library behind nvidia-smi, through dlopen: it comes with the driver, but a container may lack it. Declared from NVIDIA's documentation. */
#ifndef LCTX_NVML_H
#define LCTX_NVML_H
#include <cstdint>
#include <vector>

namespace lctx::cuda::nvml {

struct Process {
  unsigned pid;
  uint64_t bytes; /* UINT64_MAX where the driver does not tell */
};

/* Bytes in use on a device by everybody; false without NVML. `device` is CUDA's index. */
bool used(int device, uint64_t* bytes);
/* Processes with a CUDA context on the device, in the driver's own numbering of processes; false without NVML. */
bool processes(int device, std::vector<Process>* out);

}  // namespace lctx::cuda::nvml
#endif
