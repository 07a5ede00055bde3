// SPDX-License-Identifier: Apache-2.0
// A radix select on order-preserving integer keys: a histogram of the top 11 bits of every key, then only the
// keys of the one bin that holds the k-th largest are looked at further. Linear in the number of scores, in
// practice a little more than two passes. Plain C++: the histogram does not vectorise, and the comparisons do
// on their own.
#include "select_threshold.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "arena.h"

namespace shadowc {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kBins = 2048;  // 11 bits: 3 passes cover 32
constexpr int kTopShift = 21, kMiddleShift = 10;

// Larger scores have larger keys; NaN ranks as +inf. -0 ranks just below +0, which changes no comparison with
// the threshold found.
uint32_t KeyOf(float score) {
  if (score != score) score = kInfinity;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

float ScoreOf(uint32_t key) {
  const uint32_t bits = (key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// Two histograms, because scores cluster: increments of one bin in a row would wait for each other.
void CountKeys(const float* scores, size_t n, uint32_t* bins) {
  uint32_t other[kBins] = {};
  size_t i = 0;
  for (; i + 2 <= n; i += 2) {
    ++bins[KeyOf(scores[i]) >> kTopShift];
    ++other[KeyOf(scores[i + 1]) >> kTopShift];
  }
  if (i < n) ++bins[KeyOf(scores[i]) >> kTopShift];
  for (size_t b = 0; b < kBins; ++b) bins[b] += other[b];
}

// The bin that holds the k-th largest (k >= 1); reduces k by what lies in higher bins.
uint32_t BinOf(const uint32_t* bins, size_t count, size_t* k) {
  size_t b = count;
  while (b > 1) {
    --b;
    if (bins[b] >= *k) return static_cast<uint32_t>(b);
    *k -= bins[b];
  }
  return 0;
}

// The k-th largest of keys that agree in their top 11 bits.
float SelectKey(const uint32_t* keys, size_t n, size_t k) {
  uint32_t bins[kBins] = {};
  for (size_t i = 0; i < n; ++i) ++bins[keys[i] >> kMiddleShift & (kBins - 1)];
  const uint32_t middle = BinOf(bins, kBins, &k);
  uint32_t low[1 << kMiddleShift] = {};
  for (size_t i = 0; i < n; ++i) {
    if ((keys[i] >> kMiddleShift & (kBins - 1)) == middle) ++low[keys[i] & ((1u << kMiddleShift) - 1)];
  }
  const uint32_t bottom = BinOf(low, size_t{1} << kMiddleShift, &k);
  return ScoreOf((keys[0] >> kTopShift << kTopShift) | middle << kMiddleShift | bottom);
}

size_t CollectKeys(const float* scores, size_t n, uint32_t bin, uint32_t* keys) {
  size_t count = 0;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t key = KeyOf(scores[i]);
    keys[count] = key;
    count += key >> kTopShift == bin;
  }
  return count;
}

// The k-th largest of one layer, 1 <= k <= n. `keys` holds n + 1.
float KthLargest(const float* scores, size_t n, size_t k, uint32_t* keys) {
  uint32_t bins[kBins] = {};
  CountKeys(scores, n, bins);
  const uint32_t bin = BinOf(bins, kBins, &k);
  return SelectKey(keys, CollectKeys(scores, n, bin, keys), k);
}

int32_t CountActive(const float* scores, size_t n, float threshold) {
  int32_t count = 0;
  for (size_t i = 0; i < n; ++i) count += !(scores[i] < threshold);
  return count;
}

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
void Finish(const SelectArgs& a, size_t row, size_t layer, float threshold, uint32_t* keys) {
  const float* scores = ScoresOf(a, row, layer);
  if (a.exempt[layer] != 0) threshold = -kInfinity;
  int32_t active = CountActive(scores, a.units, threshold);
  const size_t least = std::min(a.min_active, a.units);
  if (static_cast<size_t>(active) < least) {  // otherwise the least-th largest score is no smaller
    threshold = KthLargest(scores, a.units, least, keys);
    active = CountActive(scores, a.units, threshold);
  }
  a.threshold[row * a.layers + layer] = threshold;
  a.active[row * a.layers + layer] = active;
}

float LocalThreshold(const SelectArgs& a, size_t row, size_t layer, uint32_t* keys) {
  const size_t k = Wanted(a, row, a.units);
  if (k == a.units) return -kInfinity;
  if (k == 0) return kInfinity;
  return KthLargest(ScoresOf(a, row, layer), a.units, k, keys);
}

float GlobalThreshold(const SelectArgs& a, size_t row, const std::vector<size_t>& layers,
                      const Parallel& parallel, uint32_t* bins, uint32_t* keys) {
  const size_t n = layers.size() * a.units;
  size_t k = Wanted(a, row, n);
  if (k == n) return -kInfinity;
  if (k == 0) return kInfinity;
  std::fill(bins, bins + layers.size() * kBins, 0u);
  parallel.For(layers.size(),
               [&](size_t i) { CountKeys(ScoresOf(a, row, layers[i]), a.units, bins + i * kBins); });
  for (size_t i = 1; i < layers.size(); ++i) {
    for (size_t b = 0; b < kBins; ++b) bins[b] += bins[i * kBins + b];
  }
  const uint32_t bin = BinOf(bins, kBins, &k);
  size_t count = 0;
  for (const size_t layer : layers) count += CollectKeys(ScoresOf(a, row, layer), a.units, bin, keys + count);
  return SelectKey(keys, count, k);
}

void GlobalRow(const SelectArgs& a, size_t row, const std::vector<size_t>& layers, const Parallel& parallel,
               uint32_t* bins, uint32_t* keys) {
  const float threshold = GlobalThreshold(a, row, layers, parallel, bins, keys);
  parallel.For(a.layers, [&](size_t layer) {
    Finish(a, row, layer, threshold, ThreadArena().Take<uint32_t>(a.units + 1));
  });
}

}  // namespace

void SelectThreshold(const SelectArgs& a, const Parallel& parallel) {
  constexpr size_t kWorthThreads = 32768;  // scores: some 30 us of one core
  const size_t rows = a.batch * a.tail;
  const Parallel serial = Parallel::Serial();
  const Parallel& outer = rows * a.layers * a.units < kWorthThreads ? serial : parallel;
  if (!a.global) {
    outer.For(rows * a.layers, [&](size_t i) {
      uint32_t* keys = ThreadArena().Take<uint32_t>(a.units + 1);
      Finish(a, i / a.layers, i % a.layers, LocalThreshold(a, i / a.layers, i % a.layers, keys), keys);
    });
    return;
  }
  std::vector<size_t> layers;
  for (size_t layer = 0; layer < a.layers; ++layer) {
    if (a.exempt[layer] == 0) layers.push_back(layer);
  }
  // Few rows: threads share the layers of each. Many: each thread takes whole rows.
  const bool by_row = rows >= 8;
  const auto run = [&](size_t row, const Parallel& inner) {
    CallArena arena;
    uint32_t* bins = arena.Take<uint32_t>(std::max<size_t>(1, layers.size()) * kBins);
    GlobalRow(a, row, layers, inner, bins, arena.Take<uint32_t>(layers.size() * a.units + 1));
  };
  if (by_row) {
    outer.For(rows, [&](size_t row) { run(row, serial); });
  } else {
    for (size_t row = 0; row < rows; ++row) run(row, outer);
  }
}

}  // namespace shadowc
