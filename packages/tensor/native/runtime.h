/* The process-wide runtime of @lc/tensor: errors, allocator, counters, and the lctx_api table. No napi here. */
#ifndef LCTX_RUNTIME_H
#define LCTX_RUNTIME_H
#include "lctx/abi.h"

namespace lctx {

/* Records the calling thread's error; always returns -1. */
int set_error(const char* code, const char* message);
const char* last_error_code();
const char* last_error();

/* Marks disposed and drops the owner's reference; false when it was disposed before. */
bool dispose(lctx_tensor* t);
void* stream_of(const lctx_tensor* t);
/* True once memory is pinned (host device) rather than pageable. */
bool is_pinned(const lctx_tensor* t);

/* This copy's own table, and the one the process uses: the first loaded copy's (see exports.map: lctx_tensor_api_v1). */
const lctx_api* own_api();
const lctx_api* process_api();

}  // namespace lctx
#endif
