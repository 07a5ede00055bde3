// SPDX-License-Identifier: Apache-2.0
// The k-th largest of many scores, once per SIMD target. Scores become order-preserving integer keys. Of
// many, a sample says between which two scores the k-th should be, and only what lies there is kept; then one
// side of a pivot is kept, again and again, until few keys or only equal ones are left. The result is a
// score, so it does not depend on samples and pivots, and is the same on every target.

#if defined(SHADOWC_CPU_SELECT_KTH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_SELECT_KTH_INL_H_
#undef SHADOWC_CPU_SELECT_KTH_INL_H_
#else
#define SHADOWC_CPU_SELECT_KTH_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DScores = hn::ScalableTag<float>;
using DKeys = hn::ScalableTag<uint32_t>;

inline constexpr uint32_t kSignBit = 0x80000000u;

HWY_INLINE uint32_t BitsOf(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits;
}

HWY_INLINE float OfBits(uint32_t bits) {
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}
HWY_INLINE float OfBits(float score) { return score; }

// Larger scores have larger keys; NaN ranks as +inf. -0 ranks just below +0, which changes no comparison with
// the threshold found.
HWY_INLINE uint32_t KeyOf(float score) {
  if (score != score) score = std::numeric_limits<float>::infinity();
  const uint32_t bits = BitsOf(score);
  return (bits & kSignBit) != 0 ? ~bits : bits | kSignBit;
}

HWY_INLINE float ScoreOf(uint32_t key) { return OfBits((key & kSignBit) != 0 ? key & ~kSignBit : ~key); }

// Some keys and the smallest and largest of them.
struct Keys {
  uint32_t* key;
  size_t count = 0;
  uint32_t low = ~uint32_t{0}, high = 0;

  HWY_INLINE void Include(uint32_t smallest, uint32_t largest) {
    low = std::min(low, smallest);
    high = std::max(high, largest);
  }
};

// The keys of a vector of scores.
HWY_INLINE hn::Vec<DKeys> KeysOf(hn::Vec<DScores> score) {
  const DKeys du;
  const hn::RebindToSigned<DKeys> di;
  score = hn::IfThenElse(hn::IsNaN(score), hn::Inf(DScores()), score);
  const auto negative = hn::BitCast(du, hn::ShiftRight<31>(hn::BitCast(di, score)));
  return hn::Xor(hn::BitCast(du, score), hn::Or(negative, hn::Set(du, kSignBit)));
}

// Appends the keys of n scores, or of n scores' bits, which may be where the keys go.
template <class T>
HWY_INLINE void AppendKeys(const T* scores, size_t n, Keys* keys) {
  const DScores df;
  const DKeys du;
  const size_t lanes = hn::Lanes(df);
  auto low = hn::Set(du, ~uint32_t{0}), high = hn::Zero(du);
  uint32_t* to = keys->key + keys->count;
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto key = KeysOf(hn::BitCast(df, hn::LoadU(hn::ScalableTag<T>(), scores + i)));
    hn::StoreU(key, du, to + i);
    low = hn::Min(low, key), high = hn::Max(high, key);
  }
  if (i != 0) keys->Include(hn::ReduceMin(du, low), hn::ReduceMax(du, high));
  for (; i < n; ++i) {
    to[i] = KeyOf(OfBits(scores[i]));
    keys->Include(to[i], to[i]);
  }
  keys->count += n;
}

// How many keys are at least `pivot`.
HWY_INLINE size_t CountFrom(const Keys& keys, uint32_t pivot) {
  const DKeys du;
  const size_t lanes = hn::Lanes(du);
  const auto least = hn::Set(du, pivot);
  size_t count = 0, i = 0;
  for (; i + lanes <= keys.count; i += lanes) {
    count += hn::CountTrue(du, hn::Ge(hn::LoadU(du, keys.key + i), least));
  }
  for (; i < keys.count; ++i) count += keys.key[i] >= pivot;
  return count;
}

// Keeps the keys of one side, in place: those of at least `pivot`, or the others.
template <bool kUpper>
HWY_INLINE void Keep(uint32_t pivot, Keys* keys) {
  const DKeys du;
  const size_t lanes = hn::Lanes(du);
  const auto least = hn::Set(du, pivot), most = hn::Set(du, ~uint32_t{0}), zero = hn::Zero(du);
  auto low = most, high = zero;
  size_t kept = 0, i = 0;
  keys->low = ~uint32_t{0}, keys->high = 0;
  for (; i + lanes <= keys->count; i += lanes) {
    const auto key = hn::LoadU(du, keys->key + i);
    const auto stays = kUpper ? hn::Ge(key, least) : hn::Lt(key, least);
    low = hn::Min(low, hn::IfThenElse(stays, key, most));
    high = hn::Max(high, hn::IfThenElseZero(stays, key));
    // Never in front of what was read: kept <= i, and a whole vector of keys ends where this one does.
    kept += hn::CompressStore(key, stays, du, keys->key + kept);
  }
  if (kept != 0) keys->Include(hn::ReduceMin(du, low), hn::ReduceMax(du, high));
  for (; i < keys->count; ++i) {
    const uint32_t key = keys->key[i];
    if ((key >= pivot) != kUpper) continue;
    keys->key[kept++] = key;
    keys->Include(key, key);
  }
  keys->count = kept;
}

// A key above keys.low, at most keys.high: in the middle of the scores, or of the keys. The former halves
// what is spread evenly, the latter leaves at most 32 steps whatever the scores are.
HWY_INLINE uint32_t PivotOf(const Keys& keys, bool of_scores) {
  const float middle = 0.5f * ScoreOf(keys.low) + 0.5f * ScoreOf(keys.high);
  if (of_scores && std::isfinite(middle)) return std::clamp(KeyOf(middle), keys.low + 1, keys.high);
  return keys.low + (keys.high - keys.low) / 2 + 1;
}

// The k-th largest score, 1 <= k <= keys->count; uses the keys up.
HWY_INLINE float KthLargest(Keys* keys, size_t k) {
  constexpr size_t kFew = 48;  // sorted by scalars
  for (bool of_scores = true; keys->low != keys->high; of_scores = !of_scores) {
    if (keys->count <= kFew) {
      std::nth_element(keys->key, keys->key + (k - 1), keys->key + keys->count, std::greater<>());
      return ScoreOf(keys->key[k - 1]);
    }
    const uint32_t pivot = PivotOf(*keys, of_scores);
    const size_t above = CountFrom(*keys, pivot);
    if (above >= k) {
      Keep<true>(pivot, keys);
    } else {
      k -= above;
      Keep<false>(pivot, keys);
    }
  }
  return ScoreOf(keys->low);
}

// Scores of some layers, as many of each.
struct Scores {
  const float* const* layer;
  size_t layers, each;

  size_t Count() const { return layers * each; }
};

// Between which scores, both included, the k-th largest should be.
struct Bracket {
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
};

// From a sample, two of its standard deviations to either side. `room` holds the keys of all scores.
HWY_INLINE Bracket BracketOf(const Scores& scores, size_t k, uint32_t* room) {
  constexpr size_t kSampled = 512;
  const size_t every = scores.Count() / kSampled | 1;  // odd: scores may repeat in powers of two
  const size_t count = (scores.Count() + every - 1) / every;
  uint32_t* sample = room + count;  // bits
  for (size_t layer = 0, i = 0, taken = 0; layer < scores.layers; ++layer, i -= scores.each) {
    for (; i < scores.each; i += every) sample[taken++] = BitsOf(scores.layer[layer][i]);
  }
  const double share = static_cast<double>(k) / static_cast<double>(scores.Count());
  const double rank = share * static_cast<double>(count), off = 2.0 * std::sqrt(rank * (1.0 - share)) + 1.0;
  const auto score = [&](double place) {
    Keys keys{room};
    AppendKeys(sample, count, &keys);
    return KthLargest(&keys, static_cast<size_t>(place));
  };
  Bracket bracket;
  if (rank - off >= 1.0) bracket.high = score(rank - off);
  if (rank + off <= static_cast<double>(count)) bracket.low = score(rank + off);
  return bracket;
}

// Writes the bits of those of n scores that are within the bracket to `to`, which holds n and may be
// overwritten behind them, and adds their number to `within`; returns how many are above it, NaN among them.
HWY_INLINE size_t TakeWithin(const float* scores, size_t n, Bracket bracket, uint32_t* to, size_t* within) {
  const DScores df;
  const DKeys du;
  const size_t lanes = hn::Lanes(df);
  const auto low = hn::Set(df, bracket.low), high = hn::Set(df, bracket.high);
  size_t not_above = 0, taken = 0, i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto score = hn::LoadU(df, scores + i);
    const auto reached = hn::Le(score, high);
    not_above += hn::CountTrue(df, reached);
    const auto takes = hn::RebindMask(du, hn::AndNot(hn::Lt(score, low), reached));
    taken += hn::CompressStore(hn::BitCast(du, score), takes, du, to + taken);
  }
  for (; i < n; ++i) {
    if (!(scores[i] <= bracket.high)) continue;
    ++not_above;
    if (scores[i] >= bracket.low) to[taken++] = BitsOf(scores[i]);
  }
  *within += taken;
  return n - not_above;
}

// The k-th largest score, 1 <= k <= their number. `room` holds the keys of all.
HWY_INLINE float KthOf(const Scores& scores, size_t k, uint32_t* room) {
  constexpr size_t kMany = 2048;  // of fewer a sample costs more than it saves
  Keys keys{room};
  if (scores.Count() >= kMany) {
    const Bracket bracket = BracketOf(scores, k, room);
    size_t within = 0, above = 0;
    for (size_t layer = 0; layer < scores.layers; ++layer)
      above += TakeWithin(scores.layer[layer], scores.each, bracket, room + within, &within);
    if (above < k && k <= above + within) {
      AppendKeys(room, within, &keys);
      return KthLargest(&keys, k - above);
    }
  }
  for (size_t layer = 0; layer < scores.layers; ++layer) AppendKeys(scores.layer[layer], scores.each, &keys);
  return KthLargest(&keys, k);
}

// How many scores are not below the threshold, NaN among them.
HWY_INLINE size_t CountActive(const float* scores, size_t n, float threshold) {
  const DScores df;
  const size_t lanes = hn::Lanes(df);
  const auto least = hn::Set(df, threshold);
  size_t below = 0, i = 0;
  for (; i + lanes <= n; i += lanes) below += hn::CountTrue(df, hn::Lt(hn::LoadU(df, scores + i), least));
  for (; i < n; ++i) below += scores[i] < threshold;
  return n - below;
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
