// SPDX-License-Identifier: Apache-2.0
// Products with int4 weight rows where there is AVX2 and no 8-bit dot product, once per SIMD target.
//
// One group is two registers, and products of two bytes are added up in 16 bits before they are widened: 2.5
// instructions for eight weights in place of seven.

#if defined(SHADOWC_CPU_INT4_AVX2_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_AVX2_INL_H_
#undef SHADOWC_CPU_INT4_AVX2_INL_H_
#else
#define SHADOWC_CPU_INT4_AVX2_INL_H_
#endif

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "digits-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

#if SHADOWC_PAIRS

using GroupBytes = hn::FixedTag<uint8_t, kInt4Group / 2>;
using GroupInts = hn::Repartition<int32_t, GroupBytes>;
using GroupFloats = hn::RebindToFloat<GroupInts>;

// Sums of one group's weights * X, in some order spread over the lanes. At most 8 * 15 * 2^23 in a lane,
// which int32 holds. `low` and `high`: the group's first and second half.
HWY_INLINE hn::Vec<GroupInts> GroupSums(hn::Vec<GroupBytes> low, hn::Vec<GroupBytes> high,
                                        const int8_t* digits, size_t stride) {
  const hn::Repartition<int8_t, GroupBytes> d8;
  const hn::Repartition<int16_t, GroupBytes> d16;
  const GroupInts d32;
  // Four products of at most 15 * 128: nothing saturates.
  const auto fours = [=](size_t digit) HWY_ATTR {
    const int8_t* x = digits + digit * stride;
    return hn::Add(hn::SatWidenMulPairwiseAdd(d16, low, hn::LoadU(d8, x)),
                   hn::SatWidenMulPairwiseAdd(d16, high, hn::LoadU(d8, x + kInt4Group / 2)));
  };
  const auto one = hn::Set(d16, 1), place = hn::Set(d16, 256);
  const auto all = hn::WidenMulPairwiseAdd(d32, fours(2), one);
  const auto upper =
      hn::Add(hn::WidenMulPairwiseAdd(d32, fours(0), place), hn::WidenMulPairwiseAdd(d32, fours(1), one));
  return hn::Add(hn::ShiftLeft<8>(upper), all);
}

template <>
struct Activations<Int4Pair> : DigitRow {
  const float* offsets = nullptr;  // [groups], 8 * sum of X (one digit: of x): weights are stored plus 8
  const float* steps = nullptr;    // [groups], of a row of one digit; null: it has three, and one step

  static size_t Bytes(size_t n) { return DigitRow::Bytes(n) + n / kInt4Group * sizeof(float); }
  void Prepare(const float* row, size_t n, int8_t* memory, Int4Digits allowed) {
    float* to = reinterpret_cast<float*>(memory + DigitRow::Bytes(n));
    offsets = to;
    if (allowed == Int4Digits::kOne) return Round(row, n, memory, to);
    DigitRow::Prepare(row, n, memory);
    for (size_t g = 0; Exact() && g < n / kInt4Group; ++g) to[g] = OffsetOf(g);
  }

  void Round(const float* row, size_t n, int8_t* memory, float* to) {
    float* group_steps = reinterpret_cast<float*>(memory + n);
    x = row;
    digits = memory;
    step = 1.0;
    steps = group_steps;
    exact_ = n <= kMostInDigits && HasDigits(LargestOf(row, n));
    for (size_t g = 0; exact_ && g < n / kInt4Group; ++g) {
      int8_t* group = memory + g * kInt4Group;
      RoundGroup(row + g * kInt4Group, group, group + kInt4Group / 2, group_steps + g, to + g);
    }
  }

  float OffsetOf(size_t g) const {
    const auto eights = hn::Set(GroupBytes(), 8);
    const int8_t* group = digits + g * kInt4Group;
    const auto sums = GroupSums(eights, eights, group, stride);
    const hn::RebindToFloat<GroupInts> df;
    return hn::ReduceSum(df, hn::ConvertTo(df, sums));
  }
};

HWY_INLINE hn::Vec<GroupBytes> LowHalves(hn::Vec<GroupBytes> pairs) {
  return hn::And(pairs, hn::Set(GroupBytes(), 15));
}
HWY_INLINE hn::Vec<GroupBytes> HighHalves(hn::Vec<GroupBytes> pairs) {
  const GroupBytes d8;
  return LowHalves(
      hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(hn::Repartition<uint16_t, GroupBytes>(), pairs))));
}
HWY_INLINE hn::Vec<GroupBytes> LoadGroup(const Int4Pointer& w, size_t g) {
  return hn::LoadU(GroupBytes(), &w.pairs[g * (kInt4Group / 2)].both);
}

// Takes what the weights are stored above their values from the sums of 4 weight rows, and adds up each.
HWY_INLINE void FinishFour(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t groups,
                           hn::Vec<GroupFloats> a0, hn::Vec<GroupFloats> a1, hn::Vec<GroupFloats> a2,
                           hn::Vec<GroupFloats> a3, float* out) {
  const GroupFloats df;
  for (size_t g = 0; g < groups; g += hn::Lanes(df)) {
    const size_t m = HWY_MIN(hn::Lanes(df), groups - g);
    const auto offset = hn::LoadN(df, row.offsets + g, m);
    a0 = hn::NegMulAdd(hn::LoadN(df, w[0].scales + g, m), offset, a0);
    a1 = hn::NegMulAdd(hn::LoadN(df, w[1].scales + g, m), offset, a1);
    a2 = hn::NegMulAdd(hn::LoadN(df, w[2].scales + g, m), offset, a2);
    a3 = hn::NegMulAdd(hn::LoadN(df, w[3].scales + g, m), offset, a3);
  }
  const auto store = [&](size_t c, auto sum)
                         HWY_ATTR { out[c] = static_cast<float>(hn::ReduceSum(df, sum) * row.step); };
  store(0, a0), store(1, a1), store(2, a2), store(3, a3);
}

// One row with 4 weight rows.
template <class Fetch>
HWY_INLINE void DotGroups(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n, Fetch fetch,
                          float* out) {
  const GroupFloats df;
  const size_t groups = n / kInt4Group, stride = row.stride;
  const int8_t* HWY_RESTRICT digits = row.digits;
  const Int4Pointer w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  auto a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  for (size_t g = 0; g < groups; ++g) {
    if (g % 2 == 0) fetch.At(g);
    const auto add = [&](const Int4Pointer& weights, auto sum) HWY_ATTR {
      // The digits stay in memory: in registers they would push the weights out.
      std::atomic_signal_fence(std::memory_order_acq_rel);
      const auto pairs = LoadGroup(weights, g);
      const auto sums = GroupSums(LowHalves(pairs), HighHalves(pairs), digits + g * kInt4Group, stride);
      return hn::MulAdd(hn::ConvertTo(df, sums), hn::Set(df, weights.scales[g]), sum);
    };
    a0 = add(w0, a0), a1 = add(w1, a1), a2 = add(w2, a2), a3 = add(w3, a3);
  }
  FinishFour(row, w, groups, a0, a1, a2, a3, out);
}

// One rounded row with 4 weight rows. Its digits stay in registers: loads bind this loop.
template <class Fetch>
HWY_INLINE void DotRounded(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n, Fetch fetch,
                           float* out) {
  const hn::Repartition<int8_t, GroupBytes> d8;
  const hn::Repartition<int16_t, GroupBytes> d16;
  const GroupFloats df;
  const size_t groups = n / kInt4Group;
  const auto one = hn::Set(d16, 1);
  const Int4Pointer w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  auto a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  for (size_t g = 0; g < groups; ++g) {
    if (g % 2 == 0) fetch.At(g);
    const int8_t* digits = row.digits + g * kInt4Group;
    const auto first = InRegister(hn::LoadU(d8, digits));
    const auto second = InRegister(hn::LoadU(d8, digits + kInt4Group / 2));
    const float step = row.steps[g];
    const auto add = [&](const Int4Pointer& weights, auto sum) HWY_ATTR {
      const auto pairs = InRegister(LoadGroup(weights, g));
      // Four products of at most 15 * 128: nothing saturates.
      const auto fours = hn::Add(hn::SatWidenMulPairwiseAdd(d16, LowHalves(pairs), first),
                                 hn::SatWidenMulPairwiseAdd(d16, HighHalves(pairs), second));
      const auto sums = hn::WidenMulPairwiseAdd(GroupInts(), fours, one);
      return hn::MulAdd(hn::ConvertTo(df, sums), hn::Set(df, weights.scales[g] * step), sum);
    };
    a0 = add(w0, a0), a1 = add(w1, a1), a2 = add(w2, a2), a3 = add(w3, a3);
  }
  FinishFour(row, w, groups, a0, a1, a2, a3, out);
}

#endif  // SHADOWC_PAIRS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
