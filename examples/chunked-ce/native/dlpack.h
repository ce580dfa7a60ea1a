/* What DLPack 1.x fixes (https://dmlc.github.io/dlpack/latest/c_api.html), as any library declares it; nothing here is lc's. */
#ifndef DLPACK_H
#define DLPACK_H
#include <stdint.h>

typedef struct { uint32_t major, minor; } DLPackVersion;
typedef struct { int32_t device_type, device_id; } DLDevice; /* 1 = CPU, 2 = CUDA */
typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType; /* code 2 = float */

typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides; /* in elements; NULL = row-major */
  uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx; /* the producer's own */
  void (*deleter)(struct DLManagedTensorVersioned* self); /* the consumer calls it once, when it is done */
  uint64_t flags;
  DLTensor dl_tensor;
} DLManagedTensorVersioned;

#endif
