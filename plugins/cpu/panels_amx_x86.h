// SPDX-License-Identifier: Apache-2.0
// Products of x86 panels in AMX's tiles: int8, whose sums are exact, and bf16 with sums in float32.
#pragma once

#include "panels_mix_x86.h"

#if HWY_ARCH_X86_64

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void BeginAmx() {
  static constexpr TileShapes kShapes;
  _tile_loadconfig(&kShapes);
}

inline void EndAmx() { _tile_release(); }

enum class TileProduct { kInt8, kBf16 };

// Tile kTo += tile kA times tile kB. GCC's intrinsics take no constants of a template.
template <TileProduct kProduct, int kTo, int kA, int kB>
inline void Multiply() {
  if constexpr (kProduct == TileProduct::kInt8) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kTo), "i"(kA), "i"(kB));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kTo), "i"(kA), "i"(kB));
  }
}

inline void ZeroTiles() {
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

// The weights that a panel meets, in two halves of 16 weight rows or woven columns.
struct WeightTiles {
  const int8_t *first, *second;  // of each half
  size_t stride, step;           // bytes from row to row of a tile, and from step to step
  size_t halves;
};

inline WeightTiles TilesOf(const WeightRows& weights) {
  const size_t stride = weights.stride;
  return {weights.first, weights.first + 16 * stride, stride, kPanelStep, weights.halves};
}
inline WeightTiles TilesOf(const int8_t* woven, size_t steps) {
  return {woven, woven + steps * kPanelBlock, kPanelStep, kPanelBlock, 2};
}

// Tile kTo += the product of tile kWeights and tile kDigits: weight rows are the rows of the sums, woven
// columns their columns.
template <TileProduct kProduct, bool kRows, int kTo, int kWeights, int kDigits>
inline void Meet() {
  Multiply<kProduct, kTo, kRows ? kWeights : kDigits, kRows ? kDigits : kWeights>();
}

// Six sums fill six of the eight tiles; one holds weights, one a digit, walked there and back so that the two
// halves share one load.
template <TileProduct kProduct, bool kRows, size_t kPlaces>
void SumPlaces(const WeightTiles& weights, const Panels& panels, size_t p, const LaterRows& later,
               PanelSums* sums) {
  constexpr size_t kLast = (kPlaces - 1) * kPanelBlock;
  const int8_t* digit = panels.Panel(p);
  ZeroTiles();
  for (size_t s = 0; s < panels.steps; ++s, digit += kPlaces * kPanelBlock) {
    Fetch(later, s);
    _tile_loadd(6, weights.first + s * weights.step, weights.stride);
    _tile_loadd(7, digit + kLast, 64);
    Meet<kProduct, kRows, 0, 6, 7>();
    if constexpr (kPlaces > 1) {
      _tile_loadd(7, digit + kLast - kPanelBlock, 64);
      Meet<kProduct, kRows, 1, 6, 7>();
    }
    if constexpr (kPlaces > 2) {
      _tile_loadd(7, digit, 64);
      Meet<kProduct, kRows, 2, 6, 7>();
    }
    if (weights.halves == 1) continue;
    _tile_loadd(6, weights.second + s * weights.step, weights.stride);
    if constexpr (kPlaces > 2) {
      Meet<kProduct, kRows, 5, 6, 7>();
      _tile_loadd(7, digit + kPanelBlock, 64);
    }
    if constexpr (kPlaces > 1) {
      Meet<kProduct, kRows, 4, 6, 7>();
      _tile_loadd(7, digit + kLast, 64);
    }
    Meet<kProduct, kRows, 3, 6, 7>();
  }
  StoreTiles<kPlaces>(weights.halves, sums);
}

template <TileProduct kProduct, bool kRows>
void SumTiles(const WeightTiles& weights, const Panels& panels, size_t p, const LaterRows& later,
              PanelSums* sums) {
  switch (panels.Places(p)) {
    case 1:
      return SumPlaces<kProduct, kRows, 1>(weights, panels, p, later, sums);
    case 2:
      return SumPlaces<kProduct, kRows, 2>(weights, panels, p, later, sums);
    default:
      return SumPlaces<kProduct, kRows, 3>(weights, panels, p, later, sums);
  }
}

// Two panels of one digit share each tile of weights: four loads, which come from L2, for four products.
template <TileProduct kProduct, bool kRows>
void SumTwo(const WeightTiles& weights, const Panels& panels, size_t p, const LaterRows& later,
            PanelSums* sums) {
  const int8_t *digit = panels.Panel(p), *next = panels.Panel(p + 1);
  ZeroTiles();
  for (size_t s = 0; s < panels.steps; ++s) {
    Fetch(later, s);
    _tile_loadd(4, weights.first + s * weights.step, weights.stride);
    _tile_loadd(6, digit + s * kPanelBlock, 64);
    Meet<kProduct, kRows, 0, 4, 6>();
    _tile_loadd(7, next + s * kPanelBlock, 64);
    Meet<kProduct, kRows, 1, 4, 7>();
    if (weights.halves == 1) continue;
    _tile_loadd(5, weights.second + s * weights.step, weights.stride);
    Meet<kProduct, kRows, 2, 5, 6>();
    Meet<kProduct, kRows, 3, 5, 7>();
  }
  _tile_stored(0, sums[0][2], 64);
  _tile_stored(1, sums[2][2], 64);
  if (weights.halves == 1) return;
  _tile_stored(2, sums[1][2], 64);
  _tile_stored(3, sums[3][2], 64);
}

// ---- as PanelKernels wants them

template <TileProduct kProduct>
void DotsAmx(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
             PanelSums* sums) {
  SumTiles<kProduct, true>(TilesOf(weights), panels, p, later, sums);
}
template <TileProduct kProduct>
void DotsTwoAmx(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
                PanelSums* sums) {
  SumTwo<kProduct, true>(TilesOf(weights), panels, p, later, sums);
}
template <TileProduct kProduct>
void MixAmx(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  SumTiles<kProduct, false>(TilesOf(woven, panels.steps), panels, p, {}, sums);
}
template <TileProduct kProduct>
void MixTwoAmx(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  SumTwo<kProduct, false>(TilesOf(woven, panels.steps), panels, p, {}, sums);
}

}  // namespace shadowc
HWY_POP_ATTRIBUTES

#endif  // HWY_ARCH_X86_64
