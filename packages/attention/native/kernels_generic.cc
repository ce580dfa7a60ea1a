/* The kernels for any machine (128-bit vectors). Standard headers come first: nothing inline of theirs may be built for this target. */
#include <cmath>
#include <cstring>
#include "attention.h"
#pragma GCC diagnostic ignored "-Wpsabi"
#define VL 4
#define PANEL 2
namespace attention {
namespace {
#include "kernels.inc"
}  // namespace
const Kernels kernels_generic = {"generic", forward_tile, delta_rows, backward_segment};
}  // namespace attention
