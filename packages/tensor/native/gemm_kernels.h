/* The micro-kernels, written over a vector type. Each gemm_<instruction set>.cc includes this once, inside an anonymous namespace and with its
 * compiler target set, after defining `struct Vec`. No standard headers here: their inline functions must not be compiled for another target. */

#define LCTX_INLINE inline __attribute__((always_inline))

template <int MR, int NV, bool Tail>
LCTX_INLINE void load_b(const float* b, int32_t tail, typename Vec::type (&v)[NV]) {
#pragma GCC unroll 2
  for (int j = 0; j < NV; j++) v[j] = Tail && j == NV - 1 ? Vec::load(b + j * Vec::kWidth, tail) : Vec::load(b + j * Vec::kWidth);
}

/* KAdjacent: a is read where it lies, row-major; else a_step apart per k, with its MR rows adjacent (packed, or a transposed operand as it lies). */
template <int MR, int NV, bool KAdjacent, bool Tail>
void tile(const MicroArgs& t) {
  typename Vec::type acc[MR][NV], b[NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
    __builtin_prefetch(t.c + i * t.ldc, 1);
    if (NV > 1) __builtin_prefetch(t.c + i * t.ldc + (NV - 1) * Vec::kWidth, 1);
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) acc[i][j] = Vec::zero();
  }
  const float* at_b = t.b;
  const int64_t b_step = t.b_step, k = t.k, a_step = t.a_step;
  const int32_t tail = t.tail;
  if constexpr (KAdjacent) {
    // One pointer per three rows: row 3g + r is at base[g][r * a_step], which is an addressing mode for r = 0, 1, 2. More pointers would spill.
    constexpr int kGroups = (MR + 2) / 3;
    const float* base[kGroups];
#pragma GCC unroll 5
    for (int g = 0; g < kGroups; g++) base[g] = t.a + 3 * g * a_step;
    for (int64_t p = 0; p < k; p++) {
      load_b<MR, NV, Tail>(at_b, tail, b);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        const typename Vec::type s = Vec::broadcast(base[i / 3] + (i % 3) * a_step);
#pragma GCC unroll 2
        for (int j = 0; j < NV; j++) acc[i][j] = Vec::fma(s, b[j], acc[i][j]);
      }
#pragma GCC unroll 5
      for (int g = 0; g < kGroups; g++) base[g]++;
      at_b += b_step;
    }
  } else {
    const float* at_a = t.a;
#pragma GCC unroll 2
    for (int64_t p = 0; p < k; p++) {
      load_b<MR, NV, Tail>(at_b, tail, b);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        const typename Vec::type s = Vec::broadcast(at_a + i);
#pragma GCC unroll 2
        for (int j = 0; j < NV; j++) acc[i][j] = Vec::fma(s, b[j], acc[i][j]);
      }
      at_a += a_step;
      at_b += b_step;
    }
  }
  const typename Vec::type alpha = Vec::broadcast(&t.alpha), beta = Vec::broadcast(&t.beta);
  float* c = t.c;
  if (t.beta == 0) {  // c is not read: it may hold NaN
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++, c += t.ldc) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) {
        const typename Vec::type value = Vec::mul(acc[i][j], alpha);
        if (Tail && j == NV - 1) Vec::store(c + j * Vec::kWidth, value, tail);
        else Vec::store(c + j * Vec::kWidth, value);
      }
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++, c += t.ldc) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) {
        const bool edge = Tail && j == NV - 1;
        const typename Vec::type old = edge ? Vec::load(c + j * Vec::kWidth, tail) : Vec::load(c + j * Vec::kWidth);
        const typename Vec::type value = Vec::fma(old, beta, Vec::mul(acc[i][j], alpha));
        if (edge) Vec::store(c + j * Vec::kWidth, value, tail);
        else Vec::store(c + j * Vec::kWidth, value);
      }
    }
  }
}

/* A row of the table: tiles of 1 .. kRows rows. */
#define LCTX_TILES_4(NV, K, T) tile<1, NV, K, T>, tile<2, NV, K, T>, tile<3, NV, K, T>, tile<4, NV, K, T>
#define LCTX_TILES_6(NV, K, T) LCTX_TILES_4(NV, K, T), tile<5, NV, K, T>, tile<6, NV, K, T>
#define LCTX_TILES_14(NV, K, T)                                                                                                        \
  LCTX_TILES_6(NV, K, T), tile<7, NV, K, T>, tile<8, NV, K, T>, tile<9, NV, K, T>, tile<10, NV, K, T>, tile<11, NV, K, T>, \
      tile<12, NV, K, T>, tile<13, NV, K, T>, tile<14, NV, K, T>
#define LCTX_TABLE(ROWS)                                                                                             \
  {{{{LCTX_TILES_##ROWS(1, false, false)}, {LCTX_TILES_##ROWS(2, false, false)}},                                    \
    {{LCTX_TILES_##ROWS(1, false, true)}, {LCTX_TILES_##ROWS(2, false, true)}}},                                     \
   {{{LCTX_TILES_##ROWS(1, true, false)}, {LCTX_TILES_##ROWS(2, true, false)}},                                      \
    {{LCTX_TILES_##ROWS(1, true, true)}, {LCTX_TILES_##ROWS(2, true, true)}}}}
