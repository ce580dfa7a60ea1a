/* copy and fill: any dtype to any dtype, any strides. */
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu_kernels.h"
#include "half.h"

namespace lctx::cpu {
namespace {

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

/* i64 passes through double: exact below 2^53. */
template <class To, class From>
inline To convert(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (std::is_same_v<From, Bf16>) {
    return convert<To, float>(bf16_to_f32(v.bits));
  } else if constexpr (std::is_same_v<From, F16>) {
    return convert<To, float>(f16_to_f32(v.bits));
  } else if constexpr (std::is_same_v<To, Bf16>) {
    return Bf16{f32_to_bf16(static_cast<float>(v))};
  } else if constexpr (std::is_same_v<To, F16>) {
    return F16{f32_to_f16(static_cast<float>(v))};
  } else if constexpr (std::is_same_v<To, float>) {
    return static_cast<float>(v);
  } else {
    const double d = static_cast<double>(v);
    if (std::isnan(d)) return 0;
    if (d <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (d >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return static_cast<To>(d);
  }
}

template <class To, class From>
void row(To* dst, int64_t ds, const From* src, int64_t ss, int64_t n) {
  const bool packed = ds == 1 && ss == 1;
  if constexpr (std::is_same_v<To, From>) {
    if (packed) return static_cast<void>(std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(To)));
  } else if constexpr (std::is_same_v<To, float> && std::is_same_v<From, Bf16>) {
    if (packed) return bf16_to_f32_row(dst, &src->bits, n);
  } else if constexpr (std::is_same_v<To, float> && std::is_same_v<From, F16>) {
    if (packed) return f16_to_f32_row(dst, &src->bits, n);
  } else if constexpr (std::is_same_v<To, Bf16> && std::is_same_v<From, float>) {
    if (packed) return f32_to_bf16_row(&dst->bits, src, n);
  } else if constexpr (std::is_same_v<To, F16> && std::is_same_v<From, float>) {
    if (packed) return f32_to_f16_row(&dst->bits, src, n);
  }
  for (int64_t i = 0; i < n; i++) dst[i * ds] = convert<To, From>(src[i * ss]);
}

struct Plan {  // dimensions merged where both sides are packed; the last one is the inner loop
  int ndim = 0;
  int64_t shape[LCTX_MAX_DIMS], ds[LCTX_MAX_DIMS], ss[LCTX_MAX_DIMS];
};
Plan merge(const CopyParams& p) {
  Plan m;
  for (int i = 0; i < p.ndim; i++) {
    if (p.shape[i] == 1) continue;
    if (m.ndim && m.ds[m.ndim - 1] == p.shape[i] * p.dst.strides[i] && m.ss[m.ndim - 1] == p.shape[i] * p.src.strides[i]) {
      m.shape[m.ndim - 1] *= p.shape[i];
    } else {
      m.shape[m.ndim++] = p.shape[i];
    }
    m.ds[m.ndim - 1] = p.dst.strides[i];
    m.ss[m.ndim - 1] = p.src.strides[i];
  }
  if (m.ndim == 0) {
    m.ndim = 1;
    m.shape[0] = m.ds[0] = m.ss[0] = 1;
  }
  return m;
}

template <class To, class From>
void copy_typed(const CopyParams& p) {
  const Plan m = merge(p);
  To* dst = static_cast<To*>(p.dst.data);
  const From* src = static_cast<const From*>(p.src.data);
  const int last = m.ndim - 1;
  const int64_t inner = m.shape[last];
  int64_t outer = 1;
  for (int i = 0; i < last; i++) outer *= m.shape[i];
  if (outer == 1) {
    parallel(0, inner, 65536, [&](int64_t b, int64_t e) { row<To, From>(dst + b * m.ds[last], m.ds[last], src + b * m.ss[last], m.ss[last], e - b); });
    return;
  }
  parallel(0, outer, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, inner)), [&](int64_t b, int64_t e) {
    for (int64_t o = b; o < e; o++) {
      int64_t rest = o, at_dst = 0, at_src = 0;
      for (int i = last - 1; i >= 0; i--) {
        const int64_t index = rest % m.shape[i];
        rest /= m.shape[i];
        at_dst += index * m.ds[i];
        at_src += index * m.ss[i];
      }
      row<To, From>(dst + at_dst, m.ds[last], src + at_src, m.ss[last], inner);
    }
  });
}

template <class From>
void copy_from(const CopyParams& p) {
  switch (p.dst.dtype) {
    case LCTX_F32: return copy_typed<float, From>(p);
    case LCTX_BF16: return copy_typed<Bf16, From>(p);
    case LCTX_F16: return copy_typed<F16, From>(p);
    case LCTX_I32: return copy_typed<int32_t, From>(p);
    case LCTX_I64: return copy_typed<int64_t, From>(p);
    default: return copy_typed<uint8_t, From>(p);
  }
}

}  // namespace

void copy(const CopyParams& p) {
  for (int i = 0; i < p.ndim; i++)
    if (p.shape[i] == 0) return;
  switch (p.src.dtype) {
    case LCTX_F32: return copy_from<float>(p);
    case LCTX_BF16: return copy_from<Bf16>(p);
    case LCTX_F16: return copy_from<F16>(p);
    case LCTX_I32: return copy_from<int32_t>(p);
    case LCTX_I64: return copy_from<int64_t>(p);
    default: return copy_from<uint8_t>(p);
  }
}

void fill(const CopyParams& p, double value) {
  // A copy from one element with strides of zero, in the destination's own dtype.
  alignas(8) unsigned char element[8] = {};
  CopyParams one{};
  const float f = static_cast<float>(value);
  one.src = {const_cast<float*>(&f), LCTX_F32, {}};
  one.dst = {element, p.dst.dtype, {}};
  if (p.dst.dtype == LCTX_I32 || p.dst.dtype == LCTX_I64) {
    const int64_t i = convert<int64_t, double>(value);
    const int32_t j = convert<int32_t, double>(value);
    std::memcpy(element, p.dst.dtype == LCTX_I64 ? static_cast<const void*>(&i) : &j, p.dst.dtype == LCTX_I64 ? 8 : 4);
  } else {
    copy(one);
  }
  CopyParams all = p;
  all.src = {element, p.dst.dtype, {}};
  copy(all);
}

}  // namespace lctx::cpu
