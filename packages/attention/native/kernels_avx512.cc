/* The kernels for avx512. Standard headers come first: nothing inline of theirs may be built for this target. */
#include <cmath>
#include <cstring>
#include "attention.h"
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define VL 16
#define PANEL 4
namespace attention {
namespace {
#include "kernels.inc"
}  // namespace
const Kernels kernels_avx512 = {"avx512", forward_tile, delta_rows, backward_segment};
}  // namespace attention
#pragma GCC pop_options
#endif
