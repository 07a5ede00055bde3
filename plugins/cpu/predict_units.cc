// SPDX-License-Identifier: Apache-2.0
// Two products over weight rows and a selection in one call, see predict_units.h: as nodes of their own they
// take longer to start than to compute.
#include "predict_units.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "arena.h"
#include "select_threshold.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "predict_units.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "digits-inl.h"
#include "hwy/highway.h"
#include "norm-inl.h"
#include "product-inl.h"
#include "quads-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {

// The last `each` tokens of each sequence, one after the other.
const float* LastTokens(const PredictArgs& a, size_t each, CallArena* arena) {
  if (each == a.tokens) return a.x;
  float* rows = arena->Take<float>(a.batch * each * a.width);
  for (size_t b = 0; b < a.batch; ++b) {
    const float* from = a.x + ((b + 1) * a.tokens - each) * a.width;
    std::copy(from, from + each * a.width, rows + b * each * a.width);
  }
  return rows;
}

template <class W>
auto SecondOf(const PredictArgs& a, size_t hidden) {
  if constexpr (std::is_same_v<W, int8_t>) {
    return Quads(a, hidden);
  } else {
    return Product<W>(a.w2, a.scales2, a.b2, hidden, a.units, a.units, false);
  }
}

template <class W>
void Score(const PredictArgs& a, size_t each, float* scores, CallArena* arena, const Parallel& parallel) {
  const size_t rows = a.batch * each;
  const size_t hidden = std::is_same_v<W, int8_t> ? hwy::RoundUpTo(a.hidden, 4) : a.hidden;  // then zeros
  const Product<W> first(a.w1, a.scales1, a.b1, a.width, a.hidden, hidden, a.relu);
  const auto second = SecondOf<W>(a, hidden);
  using Between = std::conditional_t<std::is_same_v<W, int8_t>, QuadWeight, W>;
  const float* x = LastTokens(a, each, arena);
  float* between = arena->Take<float>(rows * hidden);
  if (hidden != a.hidden) std::fill_n(between, rows * hidden, 0.0f);
  if (rows == 1) {
    OneRow(first, OneRowOfX<W>(x, a.norm, a.width), between, parallel);
    OneRow(second, OneRowOfX<Between>(between, Norm{}, hidden), scores, parallel);
    return;
  }
  const float* read = NormaliseRows(x, a.norm, rows, a.width, arena, parallel);
  ManyRows<W>(first, read, a.width, rows, between, hidden, arena, parallel);
  ManyRows<Between>(second, between, hidden, rows, scores, a.units, arena, parallel);
}

}  // namespace

void PredictScores(const PredictArgs& a, size_t each, float* scores, CallArena* arena,
                   const Parallel& parallel) {
  if (a.type == WeightType::kInt8) {
    Score<int8_t>(a, each, scores, arena, parallel);
  } else {
    Score<float>(a, each, scores, arena, parallel);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {
namespace {

HWY_EXPORT(PredictScores);

float DensityOf(const PredictArgs& a, size_t batch) {
  return a.density[(a.density_batch == 1 ? 0 : batch) * a.densities + a.column];
}

void Compare(const PredictArgs& a) {
  for (size_t row = 0; row < a.batch * a.tail; ++row) {
    const float threshold = DensityOf(a, row / a.tail), *scores = a.scores + row * a.units;
    a.threshold[row] = threshold;
    a.active[row] = static_cast<int32_t>(
        std::count_if(scores, scores + a.units, [=](float score) { return !(score < threshold); }));
  }
}

void Rank(const PredictArgs& a, CallArena* arena, const Parallel& parallel) {
  float* density = arena->Take<float>(a.batch);
  for (size_t b = 0; b < a.batch; ++b) density[b] = DensityOf(a, b);
  SelectArgs select{};
  select.scores = a.scores;
  select.density = density;
  select.batch = select.density_count = a.batch;
  select.tail = a.tail;
  select.layers = 1;
  select.units = a.units;
  select.exempt = {static_cast<uint8_t>(a.exempt)};
  select.min_active = a.min_active;
  select.threshold = a.threshold;
  select.active = a.active;
  SelectThreshold(select, parallel);
}

}  // namespace

void PredictUnits(const PredictArgs& a, const Parallel& parallel) {
  const size_t each = std::max<size_t>(a.tail, 1);
  float* scores = a.tail != 0 ? a.scores : a.last;
  if (a.batch == 0 || scores == nullptr) return;
  CallArena arena;
  HWY_DYNAMIC_DISPATCH(PredictScores)(a, each, scores, &arena, parallel);
  if (a.tail == 0) return;
  for (size_t b = 0; a.last != nullptr && b < a.batch; ++b) {
    const float* from = scores + ((b + 1) * each - 1) * a.units;
    std::copy(from, from + a.units, a.last + b * a.units);
  }
  if (a.is_threshold) {
    Compare(a);
  } else {
    Rank(a, &arena, parallel);
  }
}

}  // namespace shadowc
#endif  // HWY_ONCE
