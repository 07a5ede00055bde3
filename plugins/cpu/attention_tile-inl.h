// SPDX-License-Identifier: Apache-2.0
// Softmax attention of many queries of one head over its cache, as prompts have them: a lane is a query, so
// that products, largest logits and sums need no sum across a vector. Once per SIMD target.

#if defined(SHADOWC_CPU_ATTENTION_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_ATTENTION_TILE_INL_H_
#undef SHADOWC_CPU_ATTENTION_TILE_INL_H_
#else
#define SHADOWC_CPU_ATTENTION_TILE_INL_H_
#endif

#include <algorithm>
#include <limits>

#include "arena.h"
#include "attention_core-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// From so many queries on lanes without one cost less than sums across vectors.
inline constexpr size_t kManyQueries = 8;

// What one tile of queries works in.
struct AttentionTile {
  const size_t* sees;
  size_t count, head_size;
  size_t columns;  // queries and lanes without one: whole pairs of vectors
  float* queries;  // [head_size, columns]
  float* keys;     // [4, head_size]
  float* weights;  // [keys, columns]: logits, then e^(logit - largest)
  float* inverse;  // [columns]: 1 / their sum
};

// Logits of keys k ... k + 3, of which the `most` first exist.
template <class C>
HWY_INLINE void FourKeys(const AttentionTile& tile, const C* key, size_t k, size_t most) {
  const DF df;
  const size_t lanes = hn::Lanes(df), size = tile.head_size;
  for (size_t c = 0; c < 4; ++c) {
    const C* row = key + std::min(k + c, most - 1) * size;
    float* wide = tile.keys + c * size;
    size_t d = 0;
    for (; d + lanes <= size; d += lanes) hn::StoreU(LoadWide(df, row + d), df, wide + d);
    if (d < size) hn::StoreN(LoadWideN(df, row + d, size - d), df, wide + d, size - d);
  }
  const float *k0 = tile.keys, *k1 = k0 + size, *k2 = k1 + size, *k3 = k2 + size;
  for (size_t q = 0; q < tile.columns; q += 2 * lanes) {
    VF a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    const float* x = tile.queries + q;
    for (size_t d = 0; d < size; ++d, x += tile.columns) {
      const VF x0 = hn::LoadU(df, x), x1 = hn::LoadU(df, x + lanes);
      VF v = hn::Set(df, k0[d]);
      a0 = hn::MulAdd(x0, v, a0), b0 = hn::MulAdd(x1, v, b0);
      v = hn::Set(df, k1[d]);
      a1 = hn::MulAdd(x0, v, a1), b1 = hn::MulAdd(x1, v, b1);
      v = hn::Set(df, k2[d]);
      a2 = hn::MulAdd(x0, v, a2), b2 = hn::MulAdd(x1, v, b2);
      v = hn::Set(df, k3[d]);
      a3 = hn::MulAdd(x0, v, a3), b3 = hn::MulAdd(x1, v, b3);
    }
    const auto store = [&](size_t c, VF a, VF b) HWY_ATTR {
      float* to = tile.weights + (k + c) * tile.columns + q;
      hn::StoreU(a, df, to), hn::StoreU(b, df, to + lanes);
    };
    store(0, a0, b0), store(1, a1, b1), store(2, a2, b2), store(3, a3, b3);
  }
}

// Logits become e^(logit - largest) of what each query sees; `inverse` gets 1 / their sum.
HWY_INLINE void TileSoftmax(const AttentionTile& tile, size_t most) {
  const DF df;
  const size_t lanes = hn::Lanes(df), columns = tile.columns, all = tile.sees[0];
  const VF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
  // Keys that only some queries see: by select, since a key not to be seen may be NaN.
  for (size_t k = all; k < most; ++k) {
    const size_t blind =
        static_cast<size_t>(std::upper_bound(tile.sees, tile.sees + tile.count, k) - tile.sees);
    std::fill(tile.weights + k * columns, tile.weights + k * columns + blind,
              -std::numeric_limits<float>::infinity());
  }
  for (size_t q = 0; q < columns; q += lanes) {
    VF largest = lowest, sum = hn::Zero(df);
    for (size_t k = 0; k < most; ++k)
      largest = hn::Max(largest, hn::LoadU(df, tile.weights + k * columns + q));
    for (size_t k = 0; k < most; ++k) {
      float* p = tile.weights + k * columns + q;
      const VF e = ExpOrNaN(hn::Sub(hn::LoadU(df, p), largest));
      hn::StoreU(e, df, p);
      sum = hn::Add(sum, e);
    }
    hn::StoreU(hn::Div(hn::Set(df, 1.0f), sum), df, tile.inverse + q);
  }
}

// context[r] of kRows queries from `first` on.
template <size_t kRows, class C>
HWY_INLINE void MixValues(const AttentionTile& tile, const C* value, size_t first, float* const* context) {
  const DF df;
  const size_t lanes = hn::Lanes(df), size = tile.head_size, together = tile.sees[first];
  const Strided<C> values{value, size};
  const float* weights = tile.weights + first;
  for (size_t r = 0; r < kRows; ++r) std::fill(context[first + r], context[first + r] + size, 0.0f);
  AxpyTile<kRows>(context + first, values, together, weights, 1, size, 0, values, tile.columns);
  for (size_t r = 0; r < kRows; ++r) {
    // The rest is each query's own: no 0 * value of a token that it must not see.
    const Strided<C> rest{value + together * size, size};
    AxpyTile<1>(context + first + r, rest, tile.sees[first + r] - together,
                weights + together * tile.columns + r, 1, size, 0, rest, tile.columns);
    float* y = context[first + r];
    const VF inverse = hn::Set(df, tile.inverse[first + r]);
    for (size_t d = 0; d < size; d += lanes) {
      const size_t m = HWY_MIN(lanes, size - d);
      hn::StoreN(hn::Mul(hn::LoadN(df, y + d, m), inverse), df, y + d, m);
    }
  }
}

// As AttendTile, for at least kManyQueries queries.
template <class C>
HWY_INLINE void AttendMany(const float* const* query, const size_t* sees, size_t count, const C* key,
                           const C* value, size_t head_size, float* const* context, Arena* arena) {
  const DF df;
  const size_t lanes = hn::Lanes(df), most = sees[count - 1], columns = hwy::RoundUpTo(count, 2 * lanes);
  const AttentionTile tile{sees,
                           count,
                           head_size,
                           columns,
                           arena->Take<float>(head_size * columns),
                           arena->Take<float>(4 * head_size),
                           arena->Take<float>((most + 3) / 4 * 4 * columns),
                           arena->Take<float>(columns)};
  for (size_t d = 0; d < head_size; ++d) {
    float* to = tile.queries + d * columns;
    for (size_t q = 0; q < columns; ++q) to[q] = q < count ? query[q][d] : 0.0f;
  }
  for (size_t k = 0; k < most; k += 4) FourKeys(tile, key, k, most);
  TileSoftmax(tile, most);
  ForRowGroups(count, [&](auto group, size_t r) HWY_ATTR { MixValues<group()>(tile, value, r, context); });
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
