/* The only contract between separately built @lc addons: plain C, append-only.
 *
 * @lc/tensor owns devices, memory, streams, the thread pool and GEMM, and publishes them as one `lctx_api` table.
 * Every other addon receives that table once (`init(api)`), and receives tensors as `lctx_tensor*`. No C++ type, exception,
 * CUDA or napi type crosses. A minor version appends fields (check `struct_size`); a major version breaks.
 * Functions return 0 on success; otherwise `last_error()` tells the code and message of the calling thread. */
#ifndef LCTX_ABI_H
#define LCTX_ABI_H
#include <stddef.h>
#include <stdint.h>
#include "lctx/dlpack.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LCTX_ABI_MAJOR 1u
#define LCTX_ABI_MINOR 1u
#define LCTX_TENSOR_MAGIC 0x5458434cu /* "LCXT" */
#define LCTX_API_MAGIC 0x4158434cu    /* "LCXA" */
#define LCTX_MAX_DIMS 6

/* napi type tags; `static const` because Node 20.12/21.6 keep the pointer, and no zero word (older Node compares those false). */
#define LCTX_TENSOR_TAG_LO 0x9e3779b97f4a7c15ull
#define LCTX_TENSOR_TAG_HI 0x6c632f74656e736full
#define LCTX_API_TAG_LO 0xbf58476d1ce4e5b9ull
#define LCTX_API_TAG_HI 0x6c632f6170692f31ull
#define LCTX_DLPACK_TAG_LO 0x94d049bb133111ebull
#define LCTX_DLPACK_TAG_HI 0x6c632f646c706163ull

typedef enum { LCTX_F32 = 0, LCTX_BF16 = 1, LCTX_F16 = 2, LCTX_I32 = 3, LCTX_I64 = 4, LCTX_U8 = 5 } lctx_dtype;

/* A reference-counted allocation. JS views are (lctx_tensor, byte offset, shape, strides); they never make a new one. */
typedef struct lctx_tensor {
  /* Frozen for all versions: */
  uint32_t magic, abi_major, abi_minor, struct_size;
  void (*retain)(struct lctx_tensor* self);
  void (*release)(struct lctx_tensor* self); /* frees at zero, stream-ordered on a device; any addon and any thread may call it */
  /* ABI 1.0: */
  volatile int32_t disposed; /* set by dispose(): every later use from JS is an error */
  int32_t reserved;
  uint64_t nbytes;
  void* ctx; /* producer's own */
  DLTensor view; /* shape and strides point into the producer's struct */
} lctx_tensor;

typedef struct lctx_alloc_params {
  uint32_t struct_size;
  int32_t device_type, device_id; /* kDLCPU, kDLCUDA, or kDLCUDAHost: pinned when CUDA is there, else plain memory counted as host */
  int32_t dtype;                  /* lctx_dtype */
  int32_t ndim;
  int32_t zero;
  const int64_t* shape;
  const char* label; /* counted by label; NULL = "unlabelled" */
  void* stream;      /* CUDA: the stream that allocation and free are ordered on; NULL = the device's default lc stream */
} lctx_alloc_params;

typedef struct lctx_mem_info {
  uint32_t struct_size, pad;
  uint64_t free_bytes, total_bytes; /* of the device now; for the CPU: RAM, cgroup limits included */
  uint64_t live_bytes, peak_bytes;  /* counted by the allocator */
} lctx_mem_info;

/* c[m,n] = alpha * op(a)[m,k] * op(b)[k,n] + beta * c.  Row-major; ld* = elements between rows of the *stored* matrix;
 * trans_a: a is stored [k,m]; trans_b: b is stored [n,k]. beta == 0 never reads c. */
typedef struct lctx_gemm_params {
  uint32_t struct_size;
  int32_t device_type, device_id; /* kDLCPU (f32 only) or kDLCUDA */
  int32_t a_dtype, b_dtype, c_dtype;
  int32_t trans_a, trans_b;
  int64_t m, n, k, lda, ldb, ldc;
  float alpha, beta;
  const void* a;
  const void* b;
  void* c;
  void* stream;
  int32_t backend; /* 0 = best there is, 1 = lc's own kernel, 2 = cuBLASLt */
  int32_t pad;
} lctx_gemm_params;

/* One GEMM per expert over rows sorted by expert. offsets[e]..offsets[e+1] are the rows of expert e; i32, read on the device.
 *  mode 0: c[rows_e, n] = alpha * a[rows_e, k] * op(b_e) + beta * c       (forward, input gradient); b_e = b + e * stride_b
 *  mode 1: c_e[m, n]    = alpha * a[rows_e, m]^T * b[rows_e, n] + beta*c_e (weight gradient);        c_e = c + e * stride_c
 * In mode 0, m is unused; in mode 1, k is unused. `rows` is offsets[experts], the size of a. */
typedef struct lctx_grouped_gemm_params {
  uint32_t struct_size;
  int32_t device_type, device_id;
  int32_t a_dtype, b_dtype, c_dtype;
  int32_t mode, trans_b, experts;
  float alpha, beta;
  int64_t rows, m, n, k, lda, ldb, ldc, stride_b, stride_c;
  const int32_t* offsets; /* [experts + 1] */
  const void* a;
  const void* b;
  void* c;
  void* stream;
} lctx_grouped_gemm_params;

typedef void (*lctx_range_fn)(void* ctx, int64_t begin, int64_t end);

typedef struct lctx_wrap_params {
  uint32_t struct_size;
  int32_t device_type, device_id, dtype, ndim, pad;
  uint64_t nbytes;
  const int64_t* shape;
  const char* label;
  void* data;
  void (*free_fn)(void* ctx); /* runs when the last reference goes, on whichever thread that is */
  void* ctx;
} lctx_wrap_params;

typedef void (*lctx_counter_fn)(void* ctx, const char* device, const char* label, uint64_t live_bytes, uint64_t peak_bytes,
                                uint64_t live_tensors, uint64_t allocations);

/* ABI 1.1. What this process takes of a device, as the driver counts it: CUDA context, kernels, libraries and the allocator's pool. */
typedef struct lctx_process_memory {
  uint32_t struct_size;
  int32_t source; /* 1: NVML, this process; 2: NVML, the device less what was in use before our context; 3: the whole device, as NVML is not there */
  uint64_t bytes, peak_bytes;
  uint64_t pool_bytes, pool_used_bytes; /* the allocator's share, and what of that is handed out */
  uint64_t limit_bytes;                 /* 0: none */
} lctx_process_memory;

typedef struct lctx_api {
  uint32_t magic, abi_major, abi_minor, struct_size; /* frozen */
  const char* version;                               /* @lc/tensor's package version */

  /* Errors of the calling thread. set_error returns -1 so that `return api->set_error(code, message)` works. */
  const char* (*last_error_code)(void);
  const char* (*last_error)(void);
  int (*set_error)(const char* code, const char* message);

  /* CPU. parallel_for splits [begin, end) into ranges of at least `grain`, over all threads, and returns when all are done. Called from
   * inside a range it runs serially. fn must not throw. Which thread gets which range is not fixed; ranges never overlap. */
  int32_t (*num_threads)(void);
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, lctx_range_fn fn, void* ctx);

  /* Memory. */
  int (*alloc)(const lctx_alloc_params* params, lctx_tensor** out); /* out has one reference */
  int (*mem_info)(int32_t device_type, int32_t device_id, lctx_mem_info* out);

  /* GEMM. Serial when called from inside parallel_for. */
  int (*gemm)(const lctx_gemm_params* params);
  int (*grouped_gemm)(const lctx_grouped_gemm_params* params);

  /* CUDA (return ERR_LC_NO_DRIVER etc. without it). Streams and events are cudaStream_t / cudaEvent_t as void*. */
  int (*default_stream)(int32_t device_id, void** stream);

  /* For other copies of @lc/tensor in this process, which adopt this table: whatever touches an allocation's private part. */
  int (*wrap)(const lctx_wrap_params* params, lctx_tensor** out); /* memory that somebody else owns; not counted */
  void (*attach_handle)(lctx_tensor* t);                          /* a JS handle keeps the struct (not the memory) readable */
  void (*detach_handle)(lctx_tensor* t);                          /* the handle was collected: disposes if nobody did */
  void (*visit_counters)(lctx_counter_fn fn, void* ctx);          /* label NULL: the device's total */
  void (*reset_peaks)(void);

  /* ABI 1.1. The most that this process may take: of a CUDA device everything that the driver counts, for kDLCPU the allocator's CPU and host memory
   * together. 0: no limit. An allocation beyond it fails with ERR_LC_OUT_OF_MEMORY. */
  int (*set_memory_limit)(int32_t device_type, int32_t device_id, uint64_t bytes);
  int (*process_memory)(int32_t device_id, lctx_process_memory* out); /* of a CUDA device */
} lctx_api;

#ifdef __cplusplus
static_assert(offsetof(lctx_tensor, retain) == 16 && offsetof(lctx_tensor, disposed) == 32 && offsetof(lctx_tensor, nbytes) == 40 &&
                  offsetof(lctx_tensor, view) == 56, "lctx_tensor is frozen");
static_assert(offsetof(lctx_api, version) == 16 && offsetof(lctx_api, parallel_for) == 56, "lctx_api is append-only");
}
#endif
#endif
