/* Stands for a library of somebody else that has tensors of its own: a matrix, an embedding over it, and its SGD. It knows DLPack and nothing of lc.
 * A matrix lives as long as anything refers to it: its handle in JavaScript, and every DLPack export that was not given back. */
#include <node_api.h>
#include <stdatomic.h>
#include <stdlib.h>
#include "dlpack.h"

typedef struct {
  atomic_int refs;
  int64_t shape[2];
  float* data; /* [rows, columns] */
} Matrix;

static atomic_int live_matrices, live_exports;

static void drop(Matrix* m) {
  if (atomic_fetch_sub(&m->refs, 1) > 1) return;
  free(m->data);
  free(m);
  atomic_fetch_sub(&live_matrices, 1);
}

/* DLPack: the consumer may call this on any thread, long after the handle in JavaScript is gone. */
static void give_back(DLManagedTensorVersioned* self) {
  drop(self->manager_ctx);
  free(self);
  atomic_fetch_sub(&live_exports, 1);
}

/* --- Node-API glue. A handle is an external over a Matrix*; `release` empties it, so that a collected handle drops nothing twice. --- */

static napi_value fail(napi_env env, const char* why) {
  napi_throw_type_error(env, NULL, why);
  return NULL;
}

static void collected(napi_env env, void* data, void* hint) {
  (void)env, (void)hint;
  Matrix** slot = data;
  if (*slot) drop(*slot);
  free(slot);
}

static Matrix** slot_of(napi_env env, napi_value value) {
  napi_valuetype type;
  void* data = NULL;
  if (napi_typeof(env, value, &type) == napi_ok && type == napi_external) napi_get_value_external(env, value, &data);
  if (!data || !*(Matrix**)data) return (Matrix**)fail(env, "tinylib: expected a matrix that was not released");
  return data;
}

#define ARGUMENTS(n)                                              \
  napi_value arg[n];                                              \
  size_t count = n;                                               \
  napi_get_cb_info(env, info, &count, arg, NULL, NULL);           \
  if (count < n) return fail(env, "tinylib: too few arguments")
#define MATRIX(name, i)                                           \
  Matrix** name##_slot = slot_of(env, arg[i]);                    \
  if (!name##_slot) return NULL;                                  \
  Matrix* name = *name##_slot

/* matrix(rows, columns): uniform in [-0.2, 0.2) */
static napi_value matrix(napi_env env, napi_callback_info info) {
  ARGUMENTS(2);
  int64_t rows = 0, columns = 0;
  napi_get_value_int64(env, arg[0], &rows);
  napi_get_value_int64(env, arg[1], &columns);
  if (rows <= 0 || columns <= 0 || columns > INT64_MAX / 8 / rows) return fail(env, "tinylib: a matrix has rows and columns");
  Matrix* m = malloc(sizeof *m);
  Matrix** slot = malloc(sizeof *slot);
  float* data = malloc((size_t)(rows * columns) * sizeof *data);
  if (!m || !slot || !data) return free(m), free(slot), free(data), fail(env, "tinylib: out of memory");
  *m = (Matrix){.refs = 1, .shape = {rows, columns}, .data = data};
  uint32_t state = 1;
  for (int64_t i = 0; i < rows * columns; i++) {
    state = state * 1664525u + 1013904223u;
    data[i] = ((float)(state >> 8) / 16777216.0f - 0.5f) * 0.4f;
  }
  *slot = m;
  atomic_fetch_add(&live_matrices, 1);
  napi_value handle;
  napi_create_external(env, slot, collected, NULL, &handle);
  return handle;
}

static napi_value release(napi_env env, napi_callback_info info) {
  ARGUMENTS(1);
  MATRIX(m, 0);
  *m_slot = NULL;
  drop(m);
  return NULL;
}

static napi_value address(napi_env env, napi_callback_info info) {
  ARGUMENTS(1);
  MATRIX(m, 0);
  napi_value result;
  napi_create_bigint_uint64(env, (uintptr_t)m->data, &result);
  return result;
}

/* toDLPack(matrix): address of a DLManagedTensorVersioned, which is its consumer's from now on. */
static napi_value to_dlpack(napi_env env, napi_callback_info info) {
  ARGUMENTS(1);
  MATRIX(m, 0);
  DLManagedTensorVersioned* out = malloc(sizeof *out);
  if (!out) return fail(env, "tinylib: out of memory");
  atomic_fetch_add(&m->refs, 1);
  atomic_fetch_add(&live_exports, 1);
  *out = (DLManagedTensorVersioned){
      .version = {1, 0},
      .manager_ctx = m,
      .deleter = give_back,
      .dl_tensor = {.data = m->data, .device = {1, 0}, .ndim = 2, .dtype = {2, 32, 1}, .shape = m->shape},
  };
  napi_value result;
  napi_create_bigint_uint64(env, (uintptr_t)out, &result);
  return result;
}

/* ids: Int32Array with one row of `table` for each row of `rows`. */
static const int32_t* ids_of(napi_env env, napi_value value, const Matrix* table, const Matrix* rows) {
  napi_typedarray_type type;
  size_t length = 0;
  void* data = NULL;
  if (napi_get_typedarray_info(env, value, &type, &length, &data, NULL, NULL) != napi_ok || type != napi_int32_array ||
      (int64_t)length != rows->shape[0] || table->shape[1] != rows->shape[1])
    return (const int32_t*)fail(env, "tinylib: expected an Int32Array with an id for each row, and matrices of one width");
  const int32_t* ids = data;
  for (size_t i = 0; i < length; i++)
    if (ids[i] < 0 || ids[i] >= table->shape[0]) return (const int32_t*)fail(env, "tinylib: an id is outside the table");
  return ids;
}

/* embed(table, ids, out): out[i] = table[ids[i]] */
static napi_value embed(napi_env env, napi_callback_info info) {
  ARGUMENTS(3);
  MATRIX(table, 0);
  MATRIX(out, 2);
  const int32_t* ids = ids_of(env, arg[1], table, out);
  if (!ids) return NULL;
  int64_t width = table->shape[1];
  for (int64_t i = 0; i < out->shape[0]; i++)
    for (int64_t j = 0; j < width; j++) out->data[i * width + j] = table->data[ids[i] * width + j];
  return NULL;
}

/* embedSgd(table, ids, gradient, rate): table[ids[i]] -= rate * gradient[i] */
static napi_value embed_sgd(napi_env env, napi_callback_info info) {
  ARGUMENTS(4);
  MATRIX(table, 0);
  MATRIX(gradient, 2);
  double rate = 0;
  napi_get_value_double(env, arg[3], &rate);
  const int32_t* ids = ids_of(env, arg[1], table, gradient);
  if (!ids) return NULL;
  int64_t width = table->shape[1];
  for (int64_t i = 0; i < gradient->shape[0]; i++)
    for (int64_t j = 0; j < width; j++) table->data[ids[i] * width + j] -= (float)rate * gradient->data[i * width + j];
  return NULL;
}

/* live(): [matrices, DLPack exports] that are not freed */
static napi_value live(napi_env env, napi_callback_info info) {
  (void)info;
  napi_value pair, value;
  napi_create_array_with_length(env, 2, &pair);
  napi_create_int32(env, atomic_load(&live_matrices), &value);
  napi_set_element(env, pair, 0, value);
  napi_create_int32(env, atomic_load(&live_exports), &value);
  napi_set_element(env, pair, 1, value);
  return pair;
}

NAPI_MODULE_INIT() {
  const napi_property_descriptor functions[] = {
      {"matrix", NULL, matrix, NULL, NULL, NULL, napi_enumerable, NULL},
      {"release", NULL, release, NULL, NULL, NULL, napi_enumerable, NULL},
      {"address", NULL, address, NULL, NULL, NULL, napi_enumerable, NULL},
      {"toDLPack", NULL, to_dlpack, NULL, NULL, NULL, napi_enumerable, NULL},
      {"embed", NULL, embed, NULL, NULL, NULL, napi_enumerable, NULL},
      {"embedSgd", NULL, embed_sgd, NULL, NULL, NULL, napi_enumerable, NULL},
      {"live", NULL, live, NULL, NULL, NULL, napi_enumerable, NULL},
  };
  napi_define_properties(env, exports, sizeof functions / sizeof *functions, functions);
  return exports;
}
