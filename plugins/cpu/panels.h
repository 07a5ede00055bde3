// SPDX-License-Identifier: Apache-2.0
// Products of many rows of activations with int8 weights, exact in integers (x86 with AVX-512 VNNI, or AMX).
//
// A row x becomes integers X = round(x / step) of 24 bits, written in three balanced digits of base 256, each
// in -128 ... 127. A product with int8 weights is then three sums of 8-bit products, exact in int32 for up to
// 131,000 elements and independent of the order of addition, so VNNI and AMX give the same bits. What is lost
// is the rounding of x to max|x| * 6e-8. Two digits would be half as much work again faster and lose too
// much: with max|x| of 4 standard deviations their error is three times what float32 sums are held to in the
// tests.
//
// Prompts may do with fewer digits (Panels::places). Then a row has as few as keep the rounding of a value
// below 2 % of the row's values, root mean squares of those that are not 0: one digit, unless its largest
// value is an outlier, and two even then. A row with fewer digits than its panel has zeros for the rest: its
// sums are the same as alone.
//
// 16 rows are one panel. A panel is stored in steps of 64 elements, each step as its digits of 1024 bytes
// each:
//   by row:   [16 rows][64 elements],             for sums of weight rows   (fc2, out_proj)
//   by quad:  [16 quads][16 rows][4 elements],    for dot products with weight rows (fc1, q, k, v)
#pragma once

#include <cstddef>
#include <cstdint>

namespace shadowc {

inline constexpr size_t kPanelRows = 16, kPanelStep = 64, kPanelDigits = 3;
inline constexpr size_t kPanelBlock = kPanelRows * kPanelStep;  // bytes of one digit of one step

// Results of 16 x 16 products, one plane per digit, most significant first.
using PanelSums = int32_t[kPanelDigits][kPanelRows][kPanelRows];

struct Panels {
  size_t steps;
  int8_t*
      digits;     // [panels][steps][digits of the panel][kPanelBlock], a panel's room is that of kPanelDigits
  int32_t* sums;  // [panels, kPanelDigits, kPanelRows]: sums of each row's digits
  float* step;    // [panels, kPanelRows]: x is about step * X; 0 where a row is zero or has no digits
  uint8_t* places = nullptr;  // [panels] digits of each, set by SplitRows; null: kPanelDigits, always

  int8_t* Panel(size_t p) const { return digits + p * steps * kPanelDigits * kPanelBlock; }
  size_t Places(size_t p) const { return places == nullptr ? kPanelDigits : places[p]; }
};

// What decides the digits of a row.
struct RowDigits {
  float largest;  // 0: the row is zero
  uint8_t places;
  bool exist;  // not if a value is not finite, too large or too small
};

// What FinishDots makes of 16 weight rows (which of them, `count` says) and one panel.
struct DotsTarget {
  const float* scale;    // [count] of the weight rows
  const float* bias;     // [count]
  float factor;          // after the bias
  bool relu;             // lets NaN through
  const uint16_t* mask;  // [count] bit r: row r gets the value, else 0; null: all rows
  void* const* out;      // [kPanelRows] where each row's values go; null: nowhere
  bool float16;          // what they are stored as; else float32
  size_t count;
  uint16_t* fired;  // [count] bit r: the value of row r is not 0; null: not wanted
};

// 16 or 32 weight rows, `stride` bytes apart.
struct WeightRows {
  const int8_t* first;
  size_t stride, halves;
};

struct LaterRows {
  const int8_t* const* rows;
  size_t count;
};

// The arithmetic for one CPU. `begin` and `end` enclose every use of `dots` and `mix` on a thread.
struct PanelKernels {
  size_t least_rows;  // below, floats are faster, as most of a panel is empty
  void (*begin)();
  void (*end)();
  bool few;  // panels may have fewer digits
  // Of x[i] * factor[i], i < n (factor null: 1); x null: of a row of zeros.
  RowDigits (*measure)(const float* x, const float* factor, size_t n, bool few);
  // Row r of panel p, by row, from the values that were measured; zeros if they have no digits.
  void (*split)(const float* x, const float* factor, size_t n, const RowDigits& digits, const Panels& panels,
                size_t p, size_t r);
  // Turns panel p from by row to by quad.
  void (*turn)(const Panels& panels, size_t p);
  // sums[i] = weight rows 16 i ... 16 i + 15 (of 64 * steps elements) times panel p, stored by quad; planes
  // [weight row][panel row]. The rows of `later` are fetched into L2 meanwhile.
  void (*dots)(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
               PanelSums* sums);
  void (*finish_dots)(const PanelSums& sums, const float* step, const DotsTarget& target);
  // As finish_dots, for what mix makes of woven weight rows.
  void (*finish_woven_dots)(const PanelSums& sums, const float* step, const DotsTarget& target);
  // Weaves columns 0 ... columns - 1 of the weight rows rows[0 ... 64 * steps) for mix:
  // [columns / 32 rounded up][2][steps][16 quads][16 columns][4 rows]. A null row counts as zeros.
  void (*weave)(const int8_t* const* rows, size_t steps, size_t columns, int8_t* woven);
  // The same of 16 or 32 weight rows (of 64 * steps elements) as columns, so that mix makes their dot
  // products with panels stored by row. Null: dots does.
  void (*weave_rows)(const WeightRows& weights, size_t steps, int8_t* woven);
  // sums[i] = panel p, stored by row, times columns 16 i ... 16 i + 15 of woven weights, i < 2; planes
  // [panel row][column].
  void (*mix)(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums);
  // The same with rows that are fetched meanwhile, as dots does; null where weave_rows is.
  void (*mix_rows)(const Panels& panels, size_t p, const int8_t* woven, const LaterRows& later,
                   PanelSums* sums);
  // y[r][0 ... columns) = (bias, or y[r] if null) + step[r] * sums; columns <= 16; null y are left out.
  void (*finish_mix)(const PanelSums& sums, const float* step, const float* bias, size_t columns,
                     float* const* y);
};

// Null if the CPU, or the level in SHADOWC_ISA, has neither VNNI nor AMX.
const PanelKernels* ChosenPanelKernels();

}  // namespace shadowc
