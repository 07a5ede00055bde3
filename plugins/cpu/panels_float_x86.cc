// SPDX-License-Identifier: Apache-2.0
// Panels of floats: fp32 weights, and bf16 ones where the CPU multiplies bf16. (As fp32 they would be no
// faster than row by row.) The layouts are those of bytes: four bytes are one float, or two of bf16.
#include "panels_x86.h"

#if HWY_ARCH_X86_64

#include <cstring>

#include "isa.h"
#include "panels_amx_x86.h"
#include "panels_mix_x86.h"

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {
namespace {

void BeginNothing() {}

RowDigits MeasureFloats(const float* x, const float*, size_t, Rounding) {
  return {x == nullptr ? 0.0f : 1.0f, 1, true};
}

// kElement bytes of a value: 4, or 2 for bf16.
template <size_t kElement>
void SplitFloats(const float* x, const float* factor, size_t n, const RowDigits&, const Panels& panels,
                 size_t p, size_t r) {
  if (x == nullptr) n = 0;
  panels.step[p * kPanelRows + r] = x == nullptr ? 0.0f : 1.0f;
  int8_t* to = panels.Panel(p) + r * kPanelStep;
  for (size_t i = 0; i < panels.steps * kPanelStep / kElement; i += 16) {
    const __mmask16 some = First(i < n ? n - i : 0);
    __m512 v = _mm512_maskz_loadu_ps(some, x + i);
    if (factor != nullptr) v = _mm512_maskz_mul_ps(some, v, _mm512_maskz_loadu_ps(some, factor + i));
    const size_t byte = i * kElement;
    int8_t* here = to + byte / kPanelStep * kPanelBlock + byte % kPanelStep;
    if constexpr (kElement == 2) {
      const __m256bh rounded = _mm512_cvtneps_pbh(v);
      std::memcpy(here, &rounded, sizeof(rounded));
    } else {
      _mm512_store_ps(here, v);
    }
  }
}

// ---- weights

// Values c ... c + 15 of a row, as far as there are any, in 32 bits each.
template <size_t kElement>
inline __m512i Columns(const WeightRow& row, size_t c, __mmask16 some) {
  if (row.values == nullptr) return _mm512_setzero_si512();
  if constexpr (kElement == 4) {
    return _mm512_maskz_loadu_epi32(some, row.values + c * 4);
  } else {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row.values + c * 2));
  }
}

template <size_t kElement>
void WeaveFloats(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven) {
  constexpr size_t kRows = 4 / kElement;
  const size_t tiles = (columns + 31) / 32 * 2, fours = steps * kPanelStep / 4;
  for (size_t k = 0; k < fours; ++k) {
    for (size_t r = 0; r < kRows; ++r) {
      const size_t later = k * kRows + r + kWeavesAhead;
      if (later >= fours * kRows || rows[later].values == nullptr) continue;
      for (size_t c = 0; c < columns * kElement; c += 64) {
        _mm_prefetch(rows[later].values + first * kElement + c, _MM_HINT_T1);
      }
    }
    for (size_t t = 0; t < tiles; ++t) {
      const size_t c = t * 16;
      const __mmask16 some = First(columns > c ? columns - c : 0);
      __m512i values = Columns<kElement>(rows[k * kRows], first + c, some);
      if constexpr (kRows == 2) {
        const __m512i second = Columns<kElement>(rows[k * kRows + 1], first + c, some);
        values = _mm512_or_si512(values, _mm512_slli_epi32(second, 16));
      }
      _mm512_store_si512(woven + (t * steps + k / 16) * kPanelBlock + k % 16 * 64, values);
    }
  }
}

// ---- products

struct Floats {
  using Sum = __m512;
  static Sum Start(int32_t) { return _mm512_setzero_ps(); }
  static Sum Add(Sum sum, __m512i weights, __m512i x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(weights), _mm512_castsi512_ps(x), sum);
  }
  static __m512i Bits(Sum sum) { return _mm512_castps_si512(sum); }
};

struct Bf16Pairs {
  using Sum = __m512;
  static Sum Start(int32_t) { return _mm512_setzero_ps(); }
  static Sum Add(Sum sum, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
  }
  static __m512i Bits(Sum sum) { return _mm512_castps_si512(sum); }
};

template <class Product>
void MixRowsFloats(const Panels& panels, size_t p, const int8_t* woven, const LaterRows& later,
                   PanelSums* sums) {
  MixPlaces<Product, 1, 8>(panels, p, woven, later, sums);
}

template <class Product>
void MixFloats(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  MixRowsFloats<Product>(panels, p, woven, LaterRows{}, sums);
}

}  // namespace
}  // namespace shadowc
HWY_POP_ATTRIBUTES

namespace shadowc {
namespace {

template <class Product, size_t kElement>
constexpr PanelKernels Kernels(size_t least_rows) {
  return {
      .least_rows = least_rows,
      .most_width = SIZE_MAX,
      .element = kElement,
      .digits = 1,
      .few = false,
      .factor = nullptr,
      .unpack = nullptr,
      .begin = BeginNothing,
      .end = BeginNothing,
      .measure = MeasureFloats,
      .split = SplitFloats<kElement>,
      .turn = nullptr,
      .dots = nullptr,
      .dots_two = nullptr,
      .finish_dots = nullptr,
      .finish_woven_dots = FinishWovenDots<JoinedFloats>,
      .weave = WeaveFloats<kElement>,
      .weave_rows = WeaveRowsSigned,
      .mix = MixFloats<Product>,
      .mix_two = nullptr,
      .mix_rows = MixRowsFloats<Product>,
      .finish_mix = FinishMix<JoinedFloats>,
  };
}

constexpr PanelKernels kBf16Tiles{
    .least_rows = 12,
    .most_width = SIZE_MAX,
    .element = 2,
    .digits = 1,
    .few = false,
    .factor = nullptr,
    .unpack = nullptr,
    .begin = BeginAmx,
    .end = EndAmx,
    .measure = MeasureFloats,
    .split = SplitFloats<2>,
    .turn = TurnPanel,
    .dots = DotsAmx<TileProduct::kBf16>,
    .dots_two = DotsTwoAmx<TileProduct::kBf16>,
    .finish_dots = FinishDots<JoinedFloats>,
    .finish_woven_dots = nullptr,
    .weave = WeaveFloats<2>,
    .weave_rows = nullptr,
    .mix = MixAmx<TileProduct::kBf16>,
    .mix_two = MixTwoAmx<TileProduct::kBf16>,
    .mix_rows = nullptr,
    .finish_mix = FinishMix<JoinedFloats>,
};

}  // namespace

const PanelKernels* FloatPanelKernels(WeightType type, bool bf16_products) {
  // Measured at E = 2048 beside row by row, as its share of the time. bf16: 17 rows 0.85 to 1.2, 33 rows
  // 0.78, 512 rows 0.52; in tiles 8 rows 1.4, 10 rows 0.95, 12 rows 0.79, 33 rows 0.38. fp32: 33 rows 1.25,
  // 64 rows 1.08, 128 rows 0.94, 512 rows 0.84.
  static constexpr PanelKernels kFloat32 = Kernels<Floats, 4>(128);
  static constexpr PanelKernels kBf16 = Kernels<Bf16Pairs, 2>(24);
  if (type == WeightType::kFloat32) return &kFloat32;
  if (!bf16_products) return nullptr;
  return HasAmx() ? &kBf16Tiles : &kBf16;
}

}  // namespace shadowc

#endif  // HWY_ARCH_X86_64
