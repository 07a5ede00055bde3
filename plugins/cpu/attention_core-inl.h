// SPDX-License-Identifier: Apache-2.0
// Softmax attention of up to kTileRows queries of one head over its cache, once per SIMD target.

#if defined(SHADOWC_CPU_ATTENTION_CORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_ATTENTION_CORE_INL_H_
#undef SHADOWC_CPU_ATTENTION_CORE_INL_H_
#else
#define SHADOWC_CPU_ATTENTION_CORE_INL_H_
#endif

#include <algorithm>
#include <limits>

#include "hwy/contrib/math/math-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// e^v; NaN stays NaN, where Exp alone gives 0 and would hide a broken key.
HWY_INLINE VF ExpOrNaN(VF v) {
  const DF df;
  return hn::IfThenElse(hn::IsNaN(v), v, hn::Exp(df, v));
}

// In place: p = softmax(p).
HWY_INLINE void Softmax(float* HWY_RESTRICT p, size_t n) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  const VF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
  VF most = lowest;
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) most = hn::Max(most, hn::LoadU(df, p + i));
  if (i < n) most = hn::Max(most, hn::IfThenElse(hn::FirstN(df, n - i), hn::LoadN(df, p + i, n - i), lowest));
  most = hn::Set(df, hn::ReduceMax(df, most));
  VF sum = hn::Zero(df);
  for (i = 0; i + lanes <= n; i += lanes) {
    const VF e = ExpOrNaN(hn::Sub(hn::LoadU(df, p + i), most));
    hn::StoreU(e, df, p + i);
    sum = hn::Add(sum, e);
  }
  if (i < n) {
    const VF e = ExpOrNaN(hn::Sub(hn::LoadN(df, p + i, n - i), most));
    hn::StoreN(e, df, p + i, n - i);
    sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(df, n - i), e));
  }
  const VF inverse = hn::Set(df, 1.0f / hn::ReduceSum(df, sum));
  for (i = 0; i + lanes <= n; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(df, p + i), inverse), df, p + i);
  if (i < n) hn::StoreN(hn::Mul(hn::LoadN(df, p + i, n - i), inverse), df, p + i, n - i);
}

// to = from, in the type of the cache.
HWY_INLINE void StoreNarrow(const float* from, float* to, size_t n) { std::copy(from, from + n, to); }
HWY_INLINE void StoreNarrow(const float* from, hwy::float16_t* to, size_t n) {
  const DF df;
  const hn::Rebind<hwy::float16_t, DF> narrow;
  const hn::Rebind<uint16_t, DF> bits;
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  const size_t lanes = hn::Lanes(df);
  for (size_t i = 0; i < n; i += lanes) {
    const size_t m = HWY_MIN(lanes, n - i);
    hn::StoreN(hn::BitCast(bits, hn::DemoteTo(narrow, hn::LoadN(df, from + i, m))), bits, out + i, m);
  }
}

// How far ahead of the reading keys and values are fetched into L2; 0: left to the hardware, which stops at
// the end of every 4 KiB. On an Intel core attention to 1,000 tokens takes 0.88 of its time with 4 KiB, 0.91
// with 2 and 0.92 with 8. Not measured elsewhere; Zen 4 reads a long cache at the pace of a stream as it is.
inline constexpr size_t kCacheAheadBytes =
    HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL && HWY_TARGET != HWY_AVX3_ZEN4 ? size_t{4} << 10 : 0;

// The same in keys; a multiple of 4.
template <class C>
HWY_INLINE size_t KeysAhead(size_t head_size) {
  return kCacheAheadBytes == 0 ? 0 : std::max<size_t>(4, kCacheAheadBytes / (head_size * sizeof(C)) / 4 * 4);
}

// The first keys that AttendTile reads, and the first values where these are too few to fetch them meanwhile.
template <class C>
HWY_INLINE void PrefetchCache(const C* key, const C* value, size_t keys, size_t head_size) {
  const size_t ahead = KeysAhead<C>(head_size), first = std::min(keys, ahead);
  PrefetchStep(key, first * head_size);
  PrefetchStep(value, std::min(keys, ahead - first) * head_size);
}

// y[r] += the first `count` values, weighted; those that follow are fetched while they are read.
template <size_t kRows, class C>
HWY_INLINE void AddValues(float* const* y, const C* value, size_t count, const float* p, size_t stride,
                          size_t head_size, bool prefetch) {
  const size_t step = prefetch && kCacheAheadBytes != 0 ? KeysAhead<C>(head_size) : count;
  for (size_t k = 0; k < count; k += step) {
    const size_t here = std::min(step, count - k), later = std::min(step, count - k - here);
    AxpyTile<kRows>(y, Strided<C>{value + k * head_size, head_size}, here, p + k, stride, head_size, later,
                    Strided<C>{value + (k + here) * head_size, head_size});
  }
}

// Query i (scaled, at query[i]) sees keys 0 ... sees[i] - 1 of `key` and `value` [.., head_size]; sees
// ascends and is at least 1. context[i] receives the result. `logits` holds count * stride floats, stride >=
// the largest `sees` rounded up to 4.
template <class C>
HWY_INLINE void AttendTile(const float* const* query, const size_t* sees, size_t count, const C* key,
                           const C* value, size_t head_size, float* const* context, float* logits,
                           size_t stride) {
  const size_t most = sees[count - 1], all = sees[0];
  const size_t keys_ahead = KeysAhead<C>(head_size), keys = (most + 3) / 4 * 4;
  for (size_t k = 0; k < most; k += 4) {
    const C *rows[4], *ahead[4];
    for (size_t c = 0; c < 4; ++c) {
      rows[c] = key + std::min(k + c, most - 1) * head_size;
      const size_t later = k + c + keys_ahead;  // behind the last key: of the values
      ahead[c] =
          later < keys ? key + later * head_size : value + std::min(later - keys, most - 1) * head_size;
    }
    const C* const* later = kCacheAheadBytes == 0 ? nullptr : ahead;
    ForRowGroups(count, [&](auto group, size_t r) HWY_ATTR {
      if (sees[r + group() - 1] <= k) return;  // all of them before these keys
      DotTile<group()>(query + r, rows[0], rows[1], rows[2], rows[3], head_size, later,
                       logits + r * stride + k, stride);
      later = nullptr;
    });
  }
  for (size_t r = 0; r < count; ++r) {
    Softmax(logits + r * stride, sees[r]);
    std::fill(context[r], context[r] + head_size, 0.0f);
  }
  // The keys that all queries see together, then each query's own rest: no 0 * value of a token it must not
  // see.
  ForRowGroups(count, [&](auto group, size_t r) HWY_ATTR {
    AddValues<group()>(context + r, value, all, logits + r * stride, stride, head_size, r == 0);
  });
  for (size_t r = 0; r < count; ++r) {
    const Strided<C> rest{value + all * head_size, head_size};
    AxpyTile<1>(context + r, rest, sees[r] - all, logits + r * stride + all, stride, head_size, 0, rest);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
