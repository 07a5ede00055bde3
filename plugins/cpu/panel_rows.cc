// SPDX-License-Identifier: Apache-2.0
#include "panel_rows.h"

#include <cstring>

#include "sum_tree.h"

namespace shadowc {

namespace {

// At most kMostRowsOfDots weight rows as `dots` takes them: where they lie if it can, else gathered into
// `room` [kMostRowsOfDots, steps * kPanelStep].
WeightRows RowsForDots(const PanelKernels& kernels, const WeightRow* rows, size_t count, size_t width,
                       int8_t* room) {
  const size_t bytes = width * kernels.element, halves = (count + 15) / 16;
  const size_t padded = (bytes + kPanelStep - 1) / kPanelStep * kPanelStep;
  bool as_they_lie = kernels.unpack == nullptr && bytes == padded && count == halves * 16;
  const auto apart = [&](size_t n) { return rows[n].values - rows[n - 1].values; };
  for (size_t n = 2; as_they_lie && n < count; ++n) as_they_lie = apart(n) == apart(1);
  if (as_they_lie && apart(1) > 0) {
    return {reinterpret_cast<const int8_t*>(rows[0].values), static_cast<size_t>(apart(1)), halves};
  }
  for (size_t n = 0; n < count; ++n) {
    int8_t* to = room + n * padded;
    if (kernels.unpack != nullptr) {
      kernels.unpack(rows[n], 0, width, to);
    } else {
      std::memcpy(to, rows[n].values, bytes);
    }
    std::memset(to + bytes, 0, padded - bytes);  // meets zeros, which NaN would not leave zeros
  }
  return {room, padded, halves};
}

}  // namespace

const PanelKernels* KernelsFor(WeightType type, Rounding rounding, size_t rows, size_t width,
                               size_t weights) {
  // A call has some ten parallel sections more than with floats: small matrices are done before those start.
  constexpr size_t kLeastWeights = size_t{1} << 16;
  const PanelKernels* kernels = ChosenPanelKernels(type);
  if (kernels == nullptr || rows < kernels->least_rows || weights < kLeastWeights) return nullptr;
  if (width > kernels->most_width) return nullptr;
  const bool exact = type == WeightType::kInt8 && kernels->digits == kPanelDigits;
  // bf16 rounds activations to 8 bits, int4 its weights to the scale of a row: not finely.
  const bool fine = type == WeightType::kInt8 || type == WeightType::kFloat32;
  const bool may = rounding == Rounding::kFreely || (rounding == Rounding::kFinely && fine);
  return exact || may ? kernels : nullptr;
}

WeightTable::WeightTable(const PanelKernels& kernels, WeightType type, const void* w, const float* scales,
                         size_t width)
    : kernels_(kernels), w_(static_cast<const std::byte*>(w)), scales_(scales) {
  DispatchWeights(type, [&](auto element) {
    using W = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
    row_bytes_ = RowElements<W>(width) * sizeof(W);
    row_scales_ = RowScales<W>(width);
  });
}

WeightRow WeightTable::Row(size_t row) const {
  const float* scales = scales_ + row * row_scales_;
  return {Values(row), scales, kernels_.factor == nullptr ? *scales : kernels_.factor(scales, row_scales_)};
}

void SplitRows(const PanelKernels& kernels, const float* x, size_t stride, const float* factor, size_t rows,
               size_t width, bool by_quad, const Panels& panels, uint8_t* left, const Parallel& parallel) {
  const bool all = panels.most == kPanelDigits && panels.places == nullptr;
  const Rounding rounding = all ? Rounding::kNone : panels.rounding;
  parallel.For(PanelsOf(rows), [&](size_t p) {
    RowDigits digits[kPanelRows];
    uint8_t places = 1;
    const auto row_of = [&](size_t r) {
      const size_t row = p * kPanelRows + r;
      return row < rows ? x + row * stride : nullptr;
    };
    for (size_t r = 0; r < kPanelRows; ++r) {
      digits[r] = kernels.measure(row_of(r), factor, width, rounding);
      places = std::max(places, digits[r].places);
      if (!digits[r].exist) left[p * kPanelRows + r] = 1;
    }
    if (panels.places != nullptr) panels.places[p] = places;
    for (size_t r = 0; r < kPanelRows; ++r) kernels.split(row_of(r), factor, width, digits[r], panels, p, r);
    if (by_quad) kernels.turn(panels, p);
  });
}

DotsRoom::DotsRoom(const Panels& panels) {
  Arena& arena = ThreadArena();
  rows = arena.Take<int8_t>(kMostRowsOfDots * panels.steps * kPanelStep);
  woven = arena.Take<int8_t>(kMostRowsOfDots * panels.steps * kPanelStep);
  sums = arena.Take<PanelSums>(2 * kMostTogether);
}

RowDots::RowDots(const PanelKernels& kernels, const Panels& panels, const WeightRow* rows, size_t count,
                 size_t width, const DotsRoom& room)
    : kernels_(kernels),
      panels_(panels),
      count_(count),
      weights_(RowsForDots(kernels, rows, count, width, room.rows)),
      woven_(room.woven),
      sums_(room.sums) {
  if (!IsByQuad(kernels)) kernels.weave_rows(weights_, panels.steps, room.woven);
}

void RowDots::With(size_t p, size_t together, const LaterRows& later) const {
  if (together == 2) return kernels_.dots_two(weights_, panels_, p, later, sums_);
  if (IsByQuad(kernels_)) return kernels_.dots(weights_, panels_, p, later, sums_);
  kernels_.mix_rows(panels_, p, woven_, later, sums_);
}

void RowDots::Finish(const PanelSums& sums, size_t p, const DotsTarget& target) const {
  const auto finish = IsByQuad(kernels_) ? kernels_.finish_dots : kernels_.finish_woven_dots;
  finish(sums, panels_.Places(p), panels_.step + p * kPanelRows, target);
}

void AddWeightRows(const PanelKernels& kernels, const Panels& panels, const WeightRow* rows, size_t count,
                   const float* bias, size_t y_rows, size_t width, const uint8_t* left, float* y,
                   const Parallel& parallel) {
  // Two whole cache lines of each row of bytes, four if panels are small: they and the panels fill half of
  // L2.
  const bool small = panels.places != nullptr || panels.most == 1;
  const size_t columns = (small ? kMostWovenBytes : kMostWovenBytes / 2) / kernels.element;
  constexpr size_t kPanelsAtOnce = 16;
  const size_t depth = panels.steps * kPanelStep / kernels.element;
  const size_t slabs = (width + columns - 1) / columns;
  const size_t all_panels = PanelsOf(y_rows), groups = (all_panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
  parallel.For(slabs * groups, [&](size_t task) {
    const size_t first = task % slabs * columns, here = std::min(columns, width - first);
    const size_t p0 = task / slabs * kPanelsAtOnce, p1 = std::min(all_panels, p0 + kPanelsAtOnce);
    Arena& arena = ThreadArena();
    int8_t* woven = arena.Take<int8_t>(columns * panels.steps * kPanelStep);
    WeightRow* from = arena.Take<WeightRow>(depth);
    std::fill(std::copy(rows, rows + count, from), from + depth, WeightRow{});
    kernels.weave(from, panels.steps, first, here, woven);
    PanelSums* sums = arena.Take<PanelSums>(2 * kMostTogether);
    const PanelScope scope(kernels);
    const auto finish = [&](size_t p, const PanelSums& sum, size_t column, size_t some) {
      float* to[kPanelRows];
      for (size_t r = 0; r < kPanelRows; ++r) {
        const size_t row = p * kPanelRows + r;
        to[r] = row < y_rows && left[row] == 0 ? y + row * width + column : nullptr;
      }
      kernels.finish_mix(sum, panels.Places(p), panels.step + p * kPanelRows,
                         bias == nullptr ? nullptr : bias + column, std::min<size_t>(16, some), to);
    };
    for (size_t c = 0; c < here; c += 32) {  // two columns of tiles stay in L1, the panels pass by
      const int8_t* tiles = woven + c * panels.steps * kPanelStep;
      for (size_t p = p0, together = 1; p < p1; p += together) {
        together = PanelsTogether(kernels, panels, p, p1);
        const size_t end = std::min(y_rows, (p + together) * kPanelRows);
        for (size_t row = p * kPanelRows; row < end; ++row) {
          FetchRow(y + row * width + first + c, std::min<size_t>(2 * kPanelRows, here - c));
        }
        (together == 2 ? kernels.mix_two : kernels.mix)(panels, p, tiles, sums);
        for (size_t i = 0; i < 2 * together; ++i) {
          const size_t at = c + i % 2 * 16;
          if (at < here) finish(p + i / 2, sums[i], first + at, here - at);
        }
      }
    }
  });
}

void AddResidual(const float* residual, size_t rows, size_t width, const uint8_t* left, float* y,
                 const Parallel& parallel) {
  if (residual == nullptr) return;
  parallel.For(PanelsOf(rows), [&](size_t p) {
    for (size_t r = p * kPanelRows; r < std::min(rows, (p + 1) * kPanelRows); ++r) {
      if (left[r] == 0) AddTo(y + r * width, residual + r * width, width);
    }
  });
}

}  // namespace shadowc
