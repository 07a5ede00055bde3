// SPDX-License-Identifier: Apache-2.0
// What the files of x86 panels share: panels_x86.cc multiplies, panels_pack_x86.cc brings rows and weights
// into the layouts for it, panels_float_x86.cc does both for weights that are floats, and panels_avx2.cc for
// vectors of 256 bits. Intrinsics, not Highway: it has no tiles, and the layouts are those of AMX and of
// 512-bit vectors.
#pragma once

#include "hwy/base.h"
#include "panels.h"

#if HWY_ARCH_X86_64

#include <immintrin.h>

#define SHADOWC_PANEL_TARGETS \
  "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,fma,amx-tile,amx-int8"

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {

// How many weight rows ahead `weave` fetches.
inline constexpr size_t kWeavesAhead = 48;

inline __mmask16 First(size_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

// v[i][j] becomes v[j][i].
inline void Transpose(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// As PanelKernels has them.
RowDigits MeasureRow(const float* x, const float* factor, size_t n, Rounding rounding);
void SplitRow(const float* x, const float* factor, size_t n, const RowDigits& digits, const Panels& panels,
              size_t p, size_t r);
void TurnPanel(const Panels& panels, size_t p);
float FactorOfGroups(const float* scales, size_t groups);
void UnpackInt4(const WeightRow& row, size_t first, size_t columns, int8_t* to);
// Signed for AMX; shifted by 128 for VNNI, which takes unsigned weights.
void WeaveSigned(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven);
void WeaveShifted(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven);
void WeaveInt4Signed(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven);
void WeaveInt4Shifted(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven);
void WeaveRowsShifted(const WeightRows& weights, size_t steps, int8_t* woven);
void WeaveRowsSigned(const WeightRows& weights, size_t steps, int8_t* woven);

// For fp32, and for bf16 where there are products of it.
const PanelKernels* FloatPanelKernels(WeightType type, bool bf16_products);

// For int8 and int4 with AVX2. Not for AVX-512 without VNNI, whose floats are twice as wide.
const PanelKernels* Avx2PanelKernels(WeightType type);

}  // namespace shadowc
HWY_POP_ATTRIBUTES

#endif  // HWY_ARCH_X86_64
