// SPDX-License-Identifier: Apache-2.0
#include "panels_x86.h"

#include "digits.h"
#include "isa.h"
#include "panels_amx_x86.h"
#include "panels_mix_x86.h"

#if HWY_ARCH_X86_64

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {
namespace {

// ---- VNNI: unsigned times signed bytes. The weights are shifted by 128, and 128 times the sum of the digits
// is taken off again, at the start.

void BeginNothing() {}

// What MixRows does with integers.
struct Quads {
  using Sum = __m512i;
  static Sum Start(int32_t digits) { return _mm512_set1_epi32(-128 * digits); }
  static Sum Add(Sum sum, __m512i weights, __m512i x) { return _mm512_dpbusd_epi32(sum, weights, x); }
  static __m512i Bits(Sum sum) { return sum; }
};

void MixRowsVnni(const Panels& panels, size_t p, const int8_t* woven, const LaterRows& later,
                 PanelSums* sums) {
  switch (panels.Places(p)) {
    case 1:
      return MixPlaces<Quads, 1, 8>(panels, p, woven, later, sums);
    case 2:
      return MixPlaces<Quads, 2, 4>(panels, p, woven, later, sums);
    default:
      return MixPlaces<Quads, 3, 4>(panels, p, woven, later, sums);
  }
}

void MixVnni(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  MixRowsVnni(panels, p, woven, LaterRows{}, sums);
}

}  // namespace
}  // namespace shadowc
HWY_POP_ATTRIBUTES

namespace shadowc {

namespace {

// Measured at E = 2048: AMX needs as long for 2 rows as for 16, VNNI twice that.
constexpr PanelKernels kAmx{
    .least_rows = 8,
    .most_width = kMostInDigits,
    .element = 1,
    .digits = kPanelDigits,
    .few = true,
    .factor = nullptr,
    .unpack = nullptr,
    .begin = BeginAmx,
    .end = EndAmx,
    .measure = MeasureRow,
    .split = SplitRow,
    .turn = TurnPanel,
    .dots = DotsAmx<TileProduct::kInt8>,
    .dots_two = DotsTwoAmx<TileProduct::kInt8>,
    .finish_dots = FinishDots<JoinedDigits>,
    .finish_woven_dots = nullptr,
    .weave = WeaveSigned,
    .weave_rows = nullptr,
    .mix = MixAmx<TileProduct::kInt8>,
    .mix_two = MixTwoAmx<TileProduct::kInt8>,
    .mix_rows = nullptr,
    .finish_mix = FinishMix<JoinedDigits>,
};

constexpr PanelKernels kVnni{
    .least_rows = 16,
    .most_width = kMostInDigits,
    .element = 1,
    .digits = kPanelDigits,
    .few = true,
    .factor = nullptr,
    .unpack = nullptr,
    .begin = BeginNothing,
    .end = BeginNothing,
    .measure = MeasureRow,
    .split = SplitRow,
    .turn = nullptr,
    .dots = nullptr,
    .dots_two = nullptr,
    .finish_dots = nullptr,
    .finish_woven_dots = FinishWovenDots<JoinedDigits>,
    .weave = WeaveShifted,
    .weave_rows = WeaveRowsShifted,
    .mix = MixVnni,
    .mix_two = nullptr,
    .mix_rows = MixRowsVnni,
    .finish_mix = FinishMix<JoinedDigits>,
};

constexpr PanelKernels OfInt4(PanelKernels kernels, decltype(PanelKernels::weave) weave) {
  kernels.factor = FactorOfGroups;
  kernels.unpack = UnpackInt4;
  kernels.weave = weave;
  return kernels;
}

}  // namespace

const PanelKernels* ChosenPanelKernels(WeightType type) {
  static constexpr PanelKernels kAmxInt4 = OfInt4(kAmx, WeaveInt4Signed);
  static constexpr PanelKernels kVnniInt4 = OfInt4(kVnni, WeaveInt4Shifted);
  if (!HasVnni()) return IsAvx2() ? Avx2PanelKernels(type) : nullptr;
  switch (type) {
    case WeightType::kInt8:
      return HasAmx() ? &kAmx : &kVnni;
    case WeightType::kInt4:
      return HasAmx() ? &kAmxInt4 : &kVnniInt4;
    default:
      return FloatPanelKernels(type, HasBf16());
  }
}

}  // namespace shadowc

#else

namespace shadowc {

const PanelKernels* ChosenPanelKernels(WeightType) { return nullptr; }

}  // namespace shadowc

#endif  // HWY_ARCH_X86_64
