// SPDX-License-Identifier: Apache-2.0
#include "matmul_rows.h"

#include <algorithm>

#include "arena.h"
#include "panel_rows.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "matmul_rows.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "hwy/highway.h"
#include "product-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// A task's share of w: of smaller ones a pool that hands out one at a time gives neighbours to different
// threads, and what the end of one has prefetched for the next is of no use (in bench_kernels an LM head
// takes 0.82 of its time with this in place of 32 KiB, with twice as much 0.78; in ONNX Runtime's pool all
// are level).
inline constexpr size_t kTaskOfRows = size_t{128} << 10;

// y of rows `first` and so on, without panels.
void MultiplyRows(const MatMulRowsArgs& a, size_t first, size_t rows, CallArena* arena,
                  const Parallel& parallel) {
  const Product<int8_t> product(a.w, a.scales, nullptr, a.width, a.outputs, a.outputs, false, kTaskOfRows);
  const float* x = a.x + first * a.width;
  float* y = a.y + first * a.outputs;
  if (rows == 1) {
    OneRow(product, OneRowOfX<int8_t>(x, Norm{}, a.width), y, parallel);
  } else {
    ManyRows<int8_t>(product, x, a.width, rows, y, a.outputs, arena, parallel);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {
namespace {

HWY_EXPORT(MultiplyRows);

constexpr size_t kPanelsAtOnce = 16;

// y of panels p0 ... p1 - 1 and rows o ... o + count - 1 of w.
void Multiply32(const MatMulRowsArgs& a, const PanelKernels& kernels, const WeightTable& rows_of,
                const Panels& x, const uint8_t* left, size_t o, size_t count, size_t p0, size_t p1) {
  static constexpr float kNoBias[kMostRowsOfDots] = {};
  const DotsRoom room(x);
  WeightRow rows[kMostRowsOfDots];
  for (size_t i = 0; i < count; ++i) rows[i] = rows_of.Row(o + i);
  const std::byte* next[kMostRowsOfDots];
  const size_t next_count = std::min(kMostRowsOfDots, a.outputs - o - count);
  for (size_t i = 0; i < next_count; ++i) next[i] = rows_of.Values(o + count + i);
  const LaterRows later{next, next_count, LaterBytes(rows_of.RowBytes(), x.steps)};
  const PanelScope scope(kernels);
  const RowDots dots(kernels, x, rows, count, a.width, room);
  void* out[kPanelRows];
  dots.ForPanels(p0, p1, later, RowDots::AllRows, [&](size_t p, uint16_t, size_t i) -> DotsTarget {
    for (size_t r = 0; r < kPanelRows; ++r) {
      const size_t row = p * kPanelRows + r;
      out[r] = row < a.rows && left[row] == 0 ? a.y + row * a.outputs + o + i : nullptr;
    }
    const size_t here = std::min<size_t>(16, count - i);
    return {a.scales + o + i, kNoBias, 1.0f, false, nullptr, out, false, here, nullptr};
  });
}

void MultiplyPanels(const MatMulRowsArgs& a, const PanelKernels& kernels, CallArena* arena,
                    const Parallel& parallel) {
  const size_t panels = PanelsOf(a.rows), groups = (panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
  const size_t pieces = (a.outputs + kMostRowsOfDots - 1) / kMostRowsOfDots;
  const Panels x = TakePanels(kernels, arena, panels, a.width, Rounding::kNone);
  uint8_t* left = arena->Take<uint8_t>(panels * kPanelRows);
  std::fill(left, left + panels * kPanelRows, uint8_t{0});
  SplitRows(kernels, a.x, a.width, nullptr, a.rows, a.width, RowDots::IsByQuad(kernels), x, left, parallel);
  const WeightTable rows_of(kernels, WeightType::kInt8, a.w, a.scales, a.width);
  parallel.For(pieces * groups, [&](size_t task) {
    const size_t o = task % pieces * kMostRowsOfDots, p0 = task / pieces * kPanelsAtOnce;
    Multiply32(a, kernels, rows_of, x, left, o, std::min(kMostRowsOfDots, a.outputs - o), p0,
               std::min(panels, p0 + kPanelsAtOnce));
  });
  for (size_t row = 0; row < a.rows; ++row) {
    if (left[row] != 0) HWY_DYNAMIC_DISPATCH(MultiplyRows)(a, row, 1, arena, parallel);
  }
}

}  // namespace

void MatMulRows(const MatMulRowsArgs& a, const Parallel& parallel) {
  if (a.rows == 0 || a.outputs == 0) return;
  CallArena arena;
  const PanelKernels* kernels =
      KernelsFor(WeightType::kInt8, Rounding::kNone, a.rows, a.width, a.outputs * a.width);
  if (kernels == nullptr) {
    HWY_DYNAMIC_DISPATCH(MultiplyRows)(a, 0, a.rows, &arena, parallel);
  } else {
    MultiplyPanels(a, *kernels, &arena, parallel);
  }
}

}  // namespace shadowc
#endif  // HWY_ONCE
