/* What the op bindings check before raw pointers go to a kernel: devices, shapes, strides, and that outputs do not overlap what is still read. */
#ifndef LCTX_OPS_CHECKS_H
#define LCTX_OPS_CHECKS_H
#include <initializer_list>
#include <string>

#include "lctx/napi_glue.h"

namespace lctx {

struct Named {
  const char* key;
  const View& view;
};

[[noreturn]] inline void no_cuda(const Args& args) {
  args.fail("ERR_LC_NO_PREBUILD", "this build of @lc/tensor has no CUDA code; rebuild with LCTX_CUDA=1 and nvcc, or use CPU tensors");
}

inline std::string device_name(const View& v) {
  if (v.device.device_type == kDLCUDA) return "cuda:" + std::to_string(v.device.device_id);
  return v.device.device_type == kDLCUDAHost ? "host" : "cpu";
}

/* 'cpu' and 'host' are both CPU memory. Absent tensors are skipped. */
inline void one_device(const Args& args, std::initializer_list<Named> views) {
  const Named* first = nullptr;
  for (const Named& n : views) {
    if (!n.view) continue;
    if (!first) first = &n;
    const bool same = n.view.on_cpu() == first->view.on_cpu() && (n.view.on_cpu() || n.view.device.device_id == first->view.device.device_id);
    if (!same)
      args.fail("ERR_LC_DEVICE", std::string(first->key) + " is on " + device_name(first->view) + " but " + n.key + " is on " + device_name(n.view) +
                                     "; copy() them to one device");
  }
}

inline std::string shape_text(std::initializer_list<int64_t> shape) {
  std::string s = "[";
  for (int64_t size : shape) s += (s.size() > 1 ? "," : "") + std::to_string(size);
  return s + "]";
}

/* `beside`: the operands that the wanted shape follows from. */
inline void expect_shape(const Args& args, const Named& n, std::initializer_list<int64_t> want, std::initializer_list<Named> beside) {
  bool ok = n.view.ndim == static_cast<int32_t>(want.size());
  int i = 0;
  for (int64_t size : want) ok = ok && n.view.shape[i++] == size;
  if (ok) return;
  std::string why;
  for (const Named& other : beside) why += std::string(why.empty() ? " beside " : " and ") + other.key + " " + other.view.describe();
  args.fail("ERR_LC_SHAPE", std::string(n.key) + ": expected " + shape_text(want) + why + ", got " + n.view.describe());
}

/* First and one-past-last byte that a view touches. */
inline const char* first_byte(const View& v) { return static_cast<const char*>(v.data); }
inline const char* last_byte(const View& v) {
  int64_t at = 1;
  for (int i = 0; i < v.ndim; i++) {
    if (v.shape[i] == 0) return first_byte(v);
    at += (v.shape[i] - 1) * v.strides[i];
  }
  return first_byte(v) + at * static_cast<int64_t>(item_size(v.dtype));
}

inline bool identical(const View& a, const View& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; i++)
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}

/* Whether two views may share an element. Column ranges of one matrix (Q, K and V of one projection) interleave without sharing any. */
inline bool overlap(const View& a, const View& b) {
  if (!a || !b || first_byte(a) == last_byte(a) || first_byte(b) == last_byte(b)) return false;
  if (last_byte(a) <= first_byte(b) || last_byte(b) <= first_byte(a)) return false;
  if (!a.rows_packed() || !b.rows_packed() || a.ndim == 0 || b.ndim == 0) return true;
  const int64_t ia = static_cast<int64_t>(item_size(a.dtype)), ib = static_cast<int64_t>(item_size(b.dtype));
  const int64_t step_a = a.shape[0] > 1 ? a.strides[0] * ia : 0, step_b = b.shape[0] > 1 ? b.strides[0] * ib : 0;
  const int64_t step = step_a ? step_a : step_b;
  if (step == 0 || (step_a && step_b && step_a != step_b)) return true;
  const int64_t width_a = a.row_size() * ia, width_b = b.row_size() * ib;
  const int64_t apart = ((first_byte(a) - first_byte(b)) % step + step) % step;
  return !(apart >= width_b && apart + width_a <= step);
}

/* An output may be exactly one of its inputs where `same_allowed`; it may never overlap one partly. */
inline void apart(const Args& args, const Named& out, const Named& in, bool same_allowed) {
  if (!out.view || !in.view || !overlap(out.view, in.view) || (same_allowed && identical(out.view, in.view))) return;
  args.fail("ERR_LC_ARGUMENT", std::string(out.key) + " " + out.view.describe() + " overlaps " + in.key + " " + in.view.describe() +
                                   (same_allowed ? "; use the same view, or memory apart" : "; use memory apart"));
}

/* Two indices of an output never mean one element (an imported view may have strides that repeat). */
inline void writable(const Args& args, const Named& out) {
  const View& v = out.view;
  if (v.numel() == 0) return;
  for (int i = 0; i < v.ndim; i++)
    if (v.shape[i] > 1 && v.strides[i] == 0) args.fail("ERR_LC_STRIDES", std::string(out.key) + ": elements of " + v.describe() + " repeat (stride 0)");
  if (v.ndim > 1 && v.rows_packed() && v.shape[0] > 1 && v.strides[0] < v.row_size())
    args.fail("ERR_LC_STRIDES", std::string(out.key) + ": rows of " + v.describe() + " overlap each other");
}

}  // namespace lctx
#endif
