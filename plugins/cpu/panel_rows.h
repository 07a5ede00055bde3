// SPDX-License-Identifier: Apache-2.0
// What SparseFFN and SparseAttention share when many rows meet weights in panels: splitting rows into panels,
// dot products with weight rows, and sums of weight rows (panels.h).
#pragma once

#include <algorithm>

#include "arena.h"
#include "panels.h"
#include "parallel.h"

namespace shadowc {

// The kernels if panels pay for `rows` rows of x [width] and `weights` weights, else null. Without rounding
// only int8 weights meet panels, where they have all digits.
const PanelKernels* KernelsFor(WeightType type, Rounding rounding, size_t rows, size_t width, size_t weights);

// The rows of all records, by number.
class WeightTable {
 public:
  WeightTable(const PanelKernels& kernels, WeightType type, const void* w, const float* scales, size_t width);
  const std::byte* Values(size_t row) const { return w_ + row * row_bytes_; }
  WeightRow Row(size_t row) const;
  size_t RowBytes() const { return row_bytes_; }
  // What reading a row counts: its weights and their scales.
  size_t ReadBytes() const { return row_bytes_ + row_scales_ * sizeof(float); }

 private:
  const PanelKernels& kernels_;
  const std::byte* w_;
  const float* scales_;
  size_t row_bytes_ = 0, row_scales_ = 0;
};

inline size_t PanelsOf(size_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

inline size_t StepsOf(const PanelKernels& kernels, size_t width) {
  return (width * kernels.element + kPanelStep - 1) / kPanelStep;
}

// With rounding, where the kernels know fewer digits, a panel has as many as its rows need (panels.h).
inline Panels TakePanels(const PanelKernels& kernels, CallArena* arena, size_t panels, size_t width,
                         Rounding rounding) {
  const size_t steps = StepsOf(kernels, width);
  return {steps,
          kernels.digits,
          arena->Take<int8_t>(panels * steps * kernels.digits * kPanelBlock),
          arena->Take<int32_t>(panels * kPanelDigits * kPanelRows),
          arena->Take<float>(panels * kPanelRows),
          rounding != Rounding::kNone && kernels.few ? arena->Take<uint8_t>(panels) : nullptr,
          rounding};
}

// Rows x[r * stride ... + width), times `factor` if not null, as panels; left[r] is set if row r has no
// digits.
void SplitRows(const PanelKernels& kernels, const float* x, size_t stride, const float* factor, size_t rows,
               size_t width, bool by_quad, const Panels& panels, uint8_t* left, const Parallel& parallel);

// Fetches the `count` values, at most 2 * kPanelRows, of a row that products are going to be stored to: those
// of a panel lie in as many pages as it has rows. Into L2: they would share a few sets of L1.
inline void FetchRow(const float* to, size_t count) {
  for (size_t i = 0; i < count; i += kPanelRows) __builtin_prefetch(to + i, 0, 2);
}

// How many of panels p ... p1 - 1 meet weights at once.
inline constexpr size_t kMostTogether = 2;
inline size_t PanelsTogether(const PanelKernels& kernels, const Panels& panels, size_t p, size_t p1) {
  const bool two =
      kernels.mix_two != nullptr && p + 1 < p1 && panels.Places(p) == 1 && panels.Places(p + 1) == 1;
  return two ? 2 : 1;
}

inline constexpr size_t kMostRowsOfDots = 32;

// The memory of this thread (arena.h: it has no other meanwhile) for RowDots, of one after another.
struct DotsRoom {
  explicit DotsRoom(const Panels& panels);
  int8_t *rows, *woven;  // [kMostRowsOfDots, panels.steps * kPanelStep]
  PanelSums* sums;       // [kMostTogether, 2]
};

// Dot products of at most kMostRowsOfDots weight rows with panels. The panels are stored by row where the
// kernels weave weight rows (IsByQuad).
class RowDots {
 public:
  RowDots(const PanelKernels& kernels, const Panels& panels, const WeightRow* rows, size_t count,
          size_t width, const DotsRoom& room);
  static bool IsByQuad(const PanelKernels& kernels) { return kernels.weave_rows == nullptr; }

  // With panels p0 ... p1 - 1: wanted(p), called before the products of a panel, are its rows that have a use
  // for any (bit r: row r); target(p, wanted, i) says what becomes of those with weight rows i and so on, at
  // most 16 of them. Meanwhile the rows of `next` are fetched, a share with every panel.
  template <class Wanted, class Target>
  void ForPanels(size_t p0, size_t p1, const LaterRows& next, Wanted&& wanted, Target&& target) const {
    size_t work = 0, done = 0;
    for (size_t p = p0; p < p1; ++p) work += Work(p);
    for (size_t p = p0, together = 1; p < p1; p += together) {
      together = PanelsTogether(kernels_, panels_, p, p1);
      const size_t before = done;
      for (size_t i = 0; i < together; ++i) done += Work(p + i);
      uint16_t rows[kMostTogether], any = 0;
      for (size_t i = 0; i < together; ++i) any |= rows[i] = wanted(p + i);
      if (any == 0) continue;
      With(p, together, next.Share(before, done, work));
      for (size_t i = 0; i < 2 * together; ++i) {
        const size_t first = i % 2 * 16;
        if (first < count_) Finish(sums_[i], p + i / 2, target(p + i / 2, rows[i / 2], first));
      }
    }
  }
  static uint16_t AllRows(size_t) { return 0xFFFF; }

 private:
  // What panel p takes, in the unit of the others: tiles are always full.
  size_t Work(size_t p) const {
    return IsByQuad(kernels_) ? kPanelRows : std::max<size_t>(1, panels_.Rows(p));
  }
  void With(size_t p, size_t together, const LaterRows& later) const;
  void Finish(const PanelSums& sums, size_t p, const DotsTarget& target) const;

  const PanelKernels& kernels_;
  const Panels& panels_;
  size_t count_;
  WeightRows weights_;
  const int8_t* woven_;
  PanelSums* sums_;  // [panel, half]
};

// y[r] = (bias, or y[r] if null) + sum over k < count of row r of `panels` (by row) times weight row rows[k],
// for rows r of y (stride `width`) that are not left[r]. Null rows count as zeros and are not read. Factors
// are the caller's.
void AddWeightRows(const PanelKernels& kernels, const Panels& panels, const WeightRow* rows, size_t count,
                   const float* bias, size_t y_rows, size_t width, const uint8_t* left, float* y,
                   const Parallel& parallel);

// y[r] += residual[r] for rows of y that are not left[r]; a null residual adds nothing.
void AddResidual(const float* residual, size_t rows, size_t width, const uint8_t* left, float* y,
                 const Parallel& parallel);

// How much of each such row is fetched with every step.
inline size_t LaterBytes(size_t row_bytes, size_t steps) { return (row_bytes + steps - 1) / steps; }

// Between begin and end on this thread.
class PanelScope {
 public:
  explicit PanelScope(const PanelKernels& kernels) : kernels_(kernels) { kernels_.begin(); }
  ~PanelScope() { kernels_.end(); }
  PanelScope(const PanelScope&) = delete;
  PanelScope& operator=(const PanelScope&) = delete;

 private:
  const PanelKernels& kernels_;
};

}  // namespace shadowc
