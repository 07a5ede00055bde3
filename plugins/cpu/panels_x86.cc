// SPDX-License-Identifier: Apache-2.0
#include "panels_x86.h"

#include "isa.h"
#include "panels_mix_x86.h"

#if HWY_ARCH_X86_64

#include <algorithm>
#include <cstring>

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {
namespace {

// ---- AMX

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void BeginAmx() {
  static constexpr TileShapes kShapes;
  _tile_loadconfig(&kShapes);
}

void EndAmx() { _tile_release(); }

void ZeroTiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
}

// Of the digits of a panel, at most three, the sums of the first half are in tiles 0 to 2 and those of the
// second in 3 to 5. The last digit's plane is the last, however many there are.
template <size_t kPlaces>
void StoreTiles(size_t halves, PanelSums* sums) {
  if constexpr (kPlaces > 2) _tile_stored(2, sums[0][0], 64);
  if constexpr (kPlaces > 1) _tile_stored(1, sums[0][1], 64);
  _tile_stored(0, sums[0][2], 64);
  if (halves == 1) return;
  if constexpr (kPlaces > 2) _tile_stored(5, sums[1][0], 64);
  if constexpr (kPlaces > 1) _tile_stored(4, sums[1][1], 64);
  _tile_stored(3, sums[1][2], 64);
}

// Six sums fill six of the eight tiles; one holds weights, one a digit, walked there and back so that the two
// halves share one load.
template <size_t kPlaces>
void DotsPlaces(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
                PanelSums* sums) {
  constexpr size_t kLast = (kPlaces - 1) * kPanelBlock;
  const size_t stride = weights.stride;
  const int8_t *digit = panels.Panel(p), *first = weights.first, *second = first + 16 * stride;
  ZeroTiles();
  for (size_t s = 0; s < panels.steps; ++s, digit += kPlaces * kPanelBlock) {
    Fetch(later, s);
    _tile_loadd(6, first + s * kPanelStep, stride);
    _tile_loadd(7, digit + kLast, 64);
    _tile_dpbssd(0, 6, 7);
    if constexpr (kPlaces > 1) {
      _tile_loadd(7, digit + kLast - kPanelBlock, 64);
      _tile_dpbssd(1, 6, 7);
    }
    if constexpr (kPlaces > 2) {
      _tile_loadd(7, digit, 64);
      _tile_dpbssd(2, 6, 7);
    }
    if (weights.halves == 1) continue;
    _tile_loadd(6, second + s * kPanelStep, stride);
    if constexpr (kPlaces > 2) {
      _tile_dpbssd(5, 6, 7);
      _tile_loadd(7, digit + kPanelBlock, 64);
    }
    if constexpr (kPlaces > 1) {
      _tile_dpbssd(4, 6, 7);
      _tile_loadd(7, digit + kLast, 64);
    }
    _tile_dpbssd(3, 6, 7);
  }
  StoreTiles<kPlaces>(weights.halves, sums);
}

template <size_t kPlaces>
void MixTiles(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  constexpr size_t kLast = (kPlaces - 1) * kPanelBlock;
  const int8_t *digit = panels.Panel(p), *second = woven + panels.steps * kPanelBlock;
  ZeroTiles();
  for (size_t s = 0; s < panels.steps; ++s, digit += kPlaces * kPanelBlock) {
    _tile_loadd(6, woven + s * kPanelBlock, 64);
    _tile_loadd(7, digit + kLast, 64);
    _tile_dpbssd(0, 7, 6);
    if constexpr (kPlaces > 1) {
      _tile_loadd(7, digit + kLast - kPanelBlock, 64);
      _tile_dpbssd(1, 7, 6);
    }
    if constexpr (kPlaces > 2) {
      _tile_loadd(7, digit, 64);
      _tile_dpbssd(2, 7, 6);
    }
    _tile_loadd(6, second + s * kPanelBlock, 64);
    if constexpr (kPlaces > 2) {
      _tile_dpbssd(5, 7, 6);
      _tile_loadd(7, digit + kPanelBlock, 64);
    }
    if constexpr (kPlaces > 1) {
      _tile_dpbssd(4, 7, 6);
      _tile_loadd(7, digit + kLast, 64);
    }
    _tile_dpbssd(3, 7, 6);
  }
  StoreTiles<kPlaces>(2, sums);
}

void DotsAmx(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
             PanelSums* sums) {
  switch (panels.Places(p)) {
    case 1:
      return DotsPlaces<1>(weights, panels, p, later, sums);
    case 2:
      return DotsPlaces<2>(weights, panels, p, later, sums);
    default:
      return DotsPlaces<3>(weights, panels, p, later, sums);
  }
}

void MixAmx(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  switch (panels.Places(p)) {
    case 1:
      return MixTiles<1>(panels, p, woven, sums);
    case 2:
      return MixTiles<2>(panels, p, woven, sums);
    default:
      return MixTiles<3>(panels, p, woven, sums);
  }
}

// Two panels of one digit share each tile of weights: four loads, which come from L2, for four products.
void StoreTwo(size_t halves, PanelSums* sums) {
  _tile_stored(0, sums[0][2], 64);
  _tile_stored(1, sums[2][2], 64);
  if (halves == 1) return;
  _tile_stored(2, sums[1][2], 64);
  _tile_stored(3, sums[3][2], 64);
}

void DotsTwoAmx(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
                PanelSums* sums) {
  const size_t stride = weights.stride;
  const int8_t *digit = panels.Panel(p), *next = panels.Panel(p + 1);
  const int8_t *first = weights.first, *second = first + 16 * stride;
  ZeroTiles();
  for (size_t k = 0; k < panels.steps * kPanelBlock; k += kPanelBlock) {
    Fetch(later, k / kPanelBlock);
    _tile_loadd(4, first + k / kPanelRows, stride);
    _tile_loadd(6, digit + k, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, next + k, 64);
    _tile_dpbssd(1, 4, 7);
    if (weights.halves == 1) continue;
    _tile_loadd(5, second + k / kPanelRows, stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  StoreTwo(weights.halves, sums);
}

void MixTwoAmx(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  const int8_t *digit = panels.Panel(p), *next = panels.Panel(p + 1);
  const int8_t* second = woven + panels.steps * kPanelBlock;
  ZeroTiles();
  for (size_t k = 0; k < panels.steps * kPanelBlock; k += kPanelBlock) {
    _tile_loadd(4, woven + k, 64);
    _tile_loadd(6, digit + k, 64);
    _tile_dpbssd(0, 6, 4);
    _tile_loadd(7, next + k, 64);
    _tile_dpbssd(1, 7, 4);
    _tile_loadd(5, second + k, 64);
    _tile_dpbssd(2, 6, 5);
    _tile_dpbssd(3, 7, 5);
  }
  StoreTwo(2, sums);
}

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
    .most_width = SIZE_MAX,
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
    .dots = DotsAmx,
    .dots_two = DotsTwoAmx,
    .finish_dots = FinishDots,
    .finish_woven_dots = nullptr,
    .weave = WeaveSigned,
    .weave_rows = nullptr,
    .mix = MixAmx,
    .mix_two = MixTwoAmx,
    .mix_rows = nullptr,
    .finish_mix = FinishMix<JoinedDigits>,
};

constexpr PanelKernels kVnni{
    .least_rows = 16,
    .most_width = SIZE_MAX,
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
