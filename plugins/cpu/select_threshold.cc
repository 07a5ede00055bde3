// SPDX-License-Identifier: Apache-2.0
// Which scores are large enough, see select_kth-inl.h.
#include "select_threshold.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "arena.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "select_threshold.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "hwy/highway.h"
#include "select_kth-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {

constexpr float kEverything = -std::numeric_limits<float>::infinity();
constexpr float kNothing = std::numeric_limits<float>::infinity();

size_t Wanted(const SelectArgs& a, size_t row, size_t n) {
  double density = a.density[a.density_count == 1 ? 0 : row / a.tail];
  if (std::isnan(density)) density = 1.0;
  density = std::clamp(density, 0.0, 1.0);
  return std::min(n, static_cast<size_t>(std::floor(density * static_cast<double>(n) + 0.5)));
}

const float* ScoresOf(const SelectArgs& a, size_t row, size_t layer) {
  return a.scores + (row * a.layers + layer) * a.units;
}

// Applies exemption and min_active to one layer's threshold, and counts.
void Finish(const SelectArgs& a, size_t row, size_t layer, float threshold, uint32_t* room) {
  const float* scores = ScoresOf(a, row, layer);
  if (a.exempt[layer] != 0) threshold = kEverything;
  size_t active = CountActive(scores, a.units, threshold);
  const size_t least = std::min(a.min_active, a.units);
  if (active < least) {  // otherwise the least-th largest score is no smaller
    threshold = KthOf({&scores, 1, a.units}, least, room);
    active = CountActive(scores, a.units, threshold);
  }
  a.threshold[row * a.layers + layer] = threshold;
  a.active[row * a.layers + layer] = static_cast<int32_t>(active);
}

float LocalThreshold(const SelectArgs& a, size_t row, size_t layer, uint32_t* room) {
  const size_t k = Wanted(a, row, a.units);
  if (k == a.units) return kEverything;
  if (k == 0) return kNothing;
  const float* scores = ScoresOf(a, row, layer);
  return KthOf({&scores, 1, a.units}, k, room);
}

// By one thread: 23 layers of 8192 scores take it some 40 us, and most are in blocks.
float GlobalThreshold(const SelectArgs& a, size_t row, const std::vector<size_t>& layers, Arena* arena,
                      uint32_t* room) {
  const size_t n = layers.size() * a.units, k = Wanted(a, row, n);
  if (k == n) return kEverything;
  if (k == 0) return kNothing;
  const float** scores = arena->Take<const float*>(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) scores[i] = ScoresOf(a, row, layers[i]);
  return KthOf({scores, layers.size(), a.units}, k, room);
}

void GlobalRow(const SelectArgs& a, size_t row, const std::vector<size_t>& layers, Arena* arena) {
  uint32_t* room = arena->Take<uint32_t>(std::max<size_t>(1, layers.size()) * a.units);
  const float threshold = GlobalThreshold(a, row, layers, arena, room);
  for (size_t layer = 0; layer < a.layers; ++layer) Finish(a, row, layer, threshold, room);
}

void Run(const SelectArgs& a, const Parallel& parallel) {
  constexpr size_t kWorthThreads = 32768;  // scores: some 10 us of one core
  const size_t rows = a.batch * a.tail;
  const Parallel serial = Parallel::Serial();
  const Parallel& outer = rows * a.layers * a.units < kWorthThreads ? serial : parallel;
  if (!a.global) {
    outer.For(rows * a.layers, [&](size_t i) {
      uint32_t* room = ThreadArena().Take<uint32_t>(a.units);
      Finish(a, i / a.layers, i % a.layers, LocalThreshold(a, i / a.layers, i % a.layers, room), room);
    });
    return;
  }
  std::vector<size_t> layers;
  for (size_t layer = 0; layer < a.layers; ++layer) {
    if (a.exempt[layer] == 0) layers.push_back(layer);
  }
  outer.For(rows, [&](size_t row) { GlobalRow(a, row, layers, &ThreadArena()); });
}

}  // namespace

void SelectThreshold(const SelectArgs& args, const Parallel& parallel) { Run(args, parallel); }

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {

HWY_EXPORT(SelectThreshold);

void SelectThreshold(const SelectArgs& args, const Parallel& parallel) {
  HWY_DYNAMIC_DISPATCH(SelectThreshold)(args, parallel);
}

}  // namespace shadowc
#endif  // HWY_ONCE
