// SPDX-License-Identifier: Apache-2.0
// Products of many rows of activations with weights, in blocks (x86 with AVX2, AVX-512 VNNI, or AMX).
//
// ---- int8 weights: exact in integers
//
// A row x becomes integers X = round(x / step) of 24 bits, written in three balanced digits of base 256, each
// in -128 ... 127. A product with int8 weights is then three sums of 8-bit products, exact in int32 for up to
// 65,536 elements (kMostInDigits) and independent of the order of addition, so VNNI and AMX give the same
// bits. What is lost is the rounding of x to max|x| * 6e-8. Two digits would be half as much work again
// faster and lose too much: with max|x| of 4 standard deviations their error is three times what float32 sums
// are held to in the tests.
//
// Prompts may do with fewer digits (Panels::places). Then a row has as few as keep the rounding of a value
// below 2 % of the row's values, root mean squares of those that are not 0: one digit, unless its largest
// value is an outlier, and two even then. A row with fewer digits than its panel has zeros for the rest: its
// sums are the same as alone. Where rounding has to be fine (Rounding::kFinely), a row has two.
//
// 16 rows are one panel. A panel is stored in steps of 64 bytes of each row, each step as its digits of 1024
// bytes each:
//   by row:   [16 rows][64 bytes],             for sums of weight rows   (fc2, out_proj)
//   by quad:  [16 quads][16 rows][4 bytes],    for dot products with weight rows (fc1, q, k, v; AMX)
//
// ---- in prompts alone
//
// Where a call may round, weights meet activations in panels that have no exact products, too; of int4 and
// bf16 only where it may freely:
//   int8   with AVX2: one digit of 12 bits a row, in elements of two bytes (panels_avx2.cc).
//   int4   as int8, with one scale for a row in place of one for each of its groups. What that rounds is what
//          int8 weights are rounded by: at most 1 / 254 of the row's largest, an 18th of int4's own rounding
//          in the group with the largest scale.
//   bf16   as they are, with activations rounded to bf16 and sums in float32; not where the CPU has no such
//          products.
//   fp32   as they are, with activations as they are.
// A panel of floats has one "digit" of 2 or 4 bytes an element, no sums of digits, and step is 1. A sum is
// one chain of additions in the order of the weight rows' elements, so a row has the same bits whatever its
// neighbours are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace shadowc {

inline constexpr size_t kPanelRows = 16, kPanelStep = 64, kPanelDigits = 3;
inline constexpr size_t kPanelBlock = kPanelRows * kPanelStep;  // bytes of one digit of one step

// Results of 16 x 16 products, one plane per digit, most significant first; of fewer digits the last planes,
// of floats their bits, in the last.
using PanelSums = int32_t[kPanelDigits][kPanelRows][kPanelRows];

struct Panels {
  size_t steps;
  size_t most;     // digits that a panel has room for: kPanelDigits; 1 of floats, and with AVX2
  int8_t* digits;  // [panels][steps][digits of the panel][kPanelBlock]
  int32_t* sums;   // [panels, kPanelDigits, kPanelRows]: sums of each row's digits
  float* step;     // [panels, kPanelRows]: x is about step * X; 0 where a row is zero or has no digits
  uint8_t* places = nullptr;  // [panels] digits of each, set by SplitRows; null: `most`, always
  Rounding rounding = Rounding::kNone;

  int8_t* Panel(size_t p) const { return digits + p * steps * most * kPanelBlock; }
  size_t Places(size_t p) const { return places == nullptr ? most : places[p]; }
  // How many rows of panel p have to be multiplied, up to the last that is neither zero nor without digits.
  // The last panel is seldom full; what the sums of the others are is up to the caller, who clears them.
  size_t Rows(size_t p) const {
    size_t rows = kPanelRows;
    while (rows != 0 && step[p * kPanelRows + rows - 1] == 0.0f) --rows;
    return rows;
  }
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

// A weight row as its record has it.
struct WeightRow {
  const std::byte* values = nullptr;  // null: a row of zeros
  const float* scales = nullptr;      // of its groups, int4 only
  float factor = 0.0f;                // what its products are times
};

// 16 or 32 weight rows in the form that is multiplied, `stride` bytes apart.
struct WeightRows {
  const int8_t* first;
  size_t stride, halves;
};

// Rows that are fetched meanwhile, `bytes` of each with every step.
struct LaterRows {
  const std::byte* const* rows = nullptr;
  size_t count = 0, bytes = kPanelStep;

  // The part begin ... end of `total` (not 0).
  LaterRows Share(size_t begin, size_t end, size_t total) const {
    const size_t first = count * begin / total;
    return {rows + first, count * end / total - first, bytes};
  }
};

// The arithmetic for one CPU. `begin` and `end` enclose every use of `dots` and `mix` on a thread.
struct PanelKernels {
  size_t least_rows;  // below, floats are faster, as most of a panel is empty
  size_t most_width;  // of rows of x: sums of more products could overflow
  size_t element;     // bytes of an element, of activations (one digit) and of weights as they are multiplied
  size_t digits;      // most digits of a panel
  bool few;           // panels may have fewer digits
  // What products with a row are times, from the scales of its groups; null: a row has one scale, and that is
  // it.
  float (*factor)(const float* scales, size_t groups);
  // Writes elements first ... first + columns - 1 of a row, of int4 whole groups, in the form that is
  // multiplied. Null: rows are stored in that form.
  void (*unpack)(const WeightRow& row, size_t first, size_t columns, int8_t* to);
  void (*begin)();
  void (*end)();
  // Of x[i] * factor[i], i < n (factor null: 1); x null: of a row of zeros.
  RowDigits (*measure)(const float* x, const float* factor, size_t n, Rounding rounding);
  // Row r of panel p, by row, from the values that were measured; zeros if they have no digits.
  void (*split)(const float* x, const float* factor, size_t n, const RowDigits& digits, const Panels& panels,
                size_t p, size_t r);
  // Turns panel p from by row to by quad.
  void (*turn)(const Panels& panels, size_t p);
  // sums[i] = weight rows 16 i ... 16 i + 15 (of 64 * steps bytes) times panel p, stored by quad; planes
  // [weight row][panel row]. The rows of `later` are fetched into L2 meanwhile.
  void (*dots)(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
               PanelSums* sums);
  // The same of panels p and p + 1, of one digit each; sums[2 * i + half] of the i-th. Null, as mix_two then
  // is: one by one.
  void (*dots_two)(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
                   PanelSums* sums);
  // Of a panel of so many digits.
  void (*finish_dots)(const PanelSums& sums, size_t places, const float* step, const DotsTarget& target);
  // As finish_dots, for what mix makes of woven weight rows.
  void (*finish_woven_dots)(const PanelSums& sums, size_t places, const float* step,
                            const DotsTarget& target);
  // Weaves columns first ... first + columns - 1 of the weight rows rows[0 ... 64 * steps / element) for mix:
  // [columns / 32 rounded up][2][steps][16][16 columns][4 / element rows].
  void (*weave)(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven);
  // The same of 16 or 32 weight rows (of 64 * steps bytes) as columns, so that mix makes their dot
  // products with panels stored by row. Null: dots does.
  void (*weave_rows)(const WeightRows& weights, size_t steps, int8_t* woven);
  // sums[i] = panel p, stored by row, times columns 16 i ... 16 i + 15 of woven weights, i < 2; planes
  // [panel row][column].
  void (*mix)(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums);
  void (*mix_two)(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums);  // as dots_two
  // As mix, with rows that are fetched meanwhile, as dots does; null where weave_rows is.
  void (*mix_rows)(const Panels& panels, size_t p, const int8_t* woven, const LaterRows& later,
                   PanelSums* sums);
  // y[r][0 ... columns) = (bias, or y[r] if null) + step[r] * sums; columns <= 16; null y are left out.
  void (*finish_mix)(const PanelSums& sums, size_t places, const float* step, const float* bias,
                     size_t columns, float* const* y);
};

// How many columns `weave` takes at once, at most.
inline constexpr size_t kMostWovenBytes = 256;  // of each weight row

// Null if the CPU, or the level in SHADOWC_ISA, is neither AVX2 nor has VNNI or AMX; of bf16 and fp32 with
// AVX2; of bf16 if it has no products of it.
const PanelKernels* ChosenPanelKernels(WeightType type);

}  // namespace shadowc
