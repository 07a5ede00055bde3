// SPDX-License-Identifier: Apache-2.0
// Panels of floats: fp32 weights, and bf16 ones, with products of bf16 or as fp32. The layouts are those of
// bytes: what stands beside each other in four bytes is one float, or two of bf16.
#include "panels_x86.h"

#if HWY_ARCH_X86_64

#include <cstring>

#include "panels_mix_x86.h"

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {
namespace {

void BeginNothing() {}

RowDigits MeasureFloats(const float* x, const float*, size_t, bool) {
  return {x == nullptr ? 0.0f : 1.0f, 1, true};
}

inline __m512i WidenBf16(__m256i values) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16); }

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

void UnpackBf16(const WeightRow& row, size_t first, size_t columns, int8_t* to) {
  const std::byte* from = row.values + first * 2;
  for (size_t i = 0; i < columns; i += 16) {
    const __mmask16 some = First(columns - i);
    const __m512i wide = WidenBf16(_mm256_maskz_loadu_epi16(some, from + i * 2));
    _mm512_mask_storeu_epi32(to + i * 4, some, wide);
  }
}

enum class Stored { kFloat32, kBf16, kBf16Pairs };

// Values c ... c + 15 of a row, as far as there are any.
template <Stored kStored>
inline __m512i Columns(const WeightRow& row, size_t c, __mmask16 some) {
  if (row.values == nullptr) return _mm512_setzero_si512();
  if constexpr (kStored == Stored::kFloat32) {
    return _mm512_maskz_loadu_epi32(some, row.values + c * 4);
  } else if constexpr (kStored == Stored::kBf16) {
    return WidenBf16(_mm256_maskz_loadu_epi16(some, row.values + c * 2));
  } else {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row.values + c * 2));
  }
}

template <Stored kStored>
void WeaveFloats(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven) {
  constexpr bool kPairs = kStored == Stored::kBf16Pairs;
  constexpr size_t kRows = kPairs ? 2 : 1, kBytes = kStored == Stored::kFloat32 ? 4 : 2;
  const size_t tiles = (columns + 31) / 32 * 2, fours = steps * kPanelStep / 4;
  for (size_t k = 0; k < fours; ++k) {
    for (size_t r = 0; r < kRows; ++r) {
      const size_t later = k * kRows + r + kWeavesAhead;
      if (later >= fours * kRows || rows[later].values == nullptr) continue;
      for (size_t c = 0; c < columns * kBytes; c += 64) {
        _mm_prefetch(rows[later].values + first * kBytes + c, _MM_HINT_T1);
      }
    }
    for (size_t t = 0; t < tiles; ++t) {
      const size_t c = t * 16;
      const __mmask16 some = First(columns > c ? columns - c : 0);
      __m512i values = Columns<kStored>(rows[k * kRows], first + c, some);
      if constexpr (kPairs) {
        const __m512i second = Columns<kStored>(rows[k * kRows + 1], first + c, some);
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

template <class Product, Stored kStored>
constexpr PanelKernels Kernels() {
  constexpr size_t kElement = kStored == Stored::kBf16Pairs ? 2 : 4;
  return {
      .least_rows = 16,
      .element = kElement,
      .digits = 1,
      .few = false,
      .factor = nullptr,
      .unpack = kStored == Stored::kBf16 ? UnpackBf16 : nullptr,
      .begin = BeginNothing,
      .end = BeginNothing,
      .measure = MeasureFloats,
      .split = SplitFloats<kElement>,
      .turn = nullptr,
      .dots = nullptr,
      .finish_dots = nullptr,
      .finish_woven_dots = FinishWovenDots<JoinedFloats>,
      .weave = WeaveFloats<kStored>,
      .weave_rows = WeaveRowsSigned,
      .mix = MixFloats<Product>,
      .mix_rows = MixRowsFloats<Product>,
      .finish_mix = FinishMix<JoinedFloats>,
  };
}

}  // namespace

const PanelKernels* FloatPanelKernels(WeightType type, bool bf16_products) {
  static constexpr PanelKernels kFloat32 = Kernels<Floats, Stored::kFloat32>();
  static constexpr PanelKernels kBf16 = Kernels<Floats, Stored::kBf16>();
  static constexpr PanelKernels kBf16Pairs = Kernels<Bf16Pairs, Stored::kBf16Pairs>();
  if (type == WeightType::kFloat32) return &kFloat32;
  return bf16_products ? &kBf16Pairs : &kBf16;
}

}  // namespace shadowc

#endif  // HWY_ARCH_X86_64
