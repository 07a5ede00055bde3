// SPDX-License-Identifier: Apache-2.0
// Products with int4 weight rows, once per SIMD target.
//
// Unpacking to floats costs seven instructions for every vector of weights, several times what their bytes
// cost. With AVX-512 two groups of 64 weights are two registers of bytes instead, one of the low and one of
// the high halves: products are taken with the digits of x (see digits-inl.h), and the second kind with the
// digits of the factors (int4_sum-inl.h). With AVX2 one group is two registers, and products of two bytes
// are added up in 16 bits before they are widened: 2.5 instructions for eight weights in place of seven.

#if defined(SHADOWC_CPU_INT4_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_INL_H_
#undef SHADOWC_CPU_INT4_INL_H_
#else
#define SHADOWC_CPU_INT4_INL_H_
#endif

#include <algorithm>
#include <atomic>
#include <cstring>

#include "digits-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// Fetches the later rows' bytes of groups g and g + 1, and their scales with the first group. In fewer rounds
// than PrefetchRows on Zen 4: these kernels are bound by instructions. On an Intel core with VNNI one round
// in place of three takes 0.77 to 0.99 of a call's time (of twelve measured one took 1.18), none 1.1 to 1.9.
template <class Row>
HWY_INLINE void PrefetchGroups(Row later, size_t count, size_t g, size_t groups) {
  constexpr size_t kRounds = HWY_TARGET == HWY_AVX3_ZEN4 || SHADOWC_PAIRS ? 3 : 1;
  InRounds<kRounds>(count, [=](size_t c) HWY_ATTR { PrefetchL2(later(c).pairs + g * (kInt4Group / 2)); });
  for (size_t c = 0; g == 0 && c < count; ++c) {
    for (size_t s = 0; s < groups; s += kLine / sizeof(float)) PrefetchL2(later(c).scales + s);
  }
}

#if SHADOWC_DIGITS || SHADOWC_PAIRS

#if SHADOWC_DIGITS
using GroupBytes = hn::ScalableTag<uint8_t>;  // 64
#else
using GroupBytes = hn::FixedTag<uint8_t, kInt4Group / 2>;
#endif
using GroupInts = hn::Repartition<int32_t, GroupBytes>;

// Sums of one group's weights * X, in some order spread over the lanes. At most 8 * 15 * 2^23 in a lane,
// which int32 holds.
#if SHADOWC_DIGITS
HWY_INLINE hn::Vec<GroupInts> GroupSums(hn::Vec<GroupBytes> weights, const int8_t* digits, size_t stride) {
  const hn::Repartition<int8_t, GroupBytes> d8;
  const GroupInts d32;
  auto sums = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits), hn::Zero(d32));
  sums = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits + stride), hn::ShiftLeft<8>(sums));
  return hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits + 2 * stride), hn::ShiftLeft<8>(sums));
}
#else
// `low` and `high`: the group's first and second half.
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
  const auto one = hn::Set(d16, 1);
  const auto upper = hn::Add(hn::WidenMulPairwiseAdd(d32, fours(0), hn::Set(d16, 256)),
                             hn::WidenMulPairwiseAdd(d32, fours(1), one));
  return hn::Add(hn::ShiftLeft<8>(upper), hn::WidenMulPairwiseAdd(d32, fours(2), one));
}
#endif

template <>
struct Activations<Int4Pair> : DigitRow {
  const float* offsets = nullptr;  // [groups], 8 * sum of X in the group: weights are stored plus 8

  static size_t Bytes(size_t n) { return DigitRow::Bytes(n) + n / kInt4Group * sizeof(float); }
  void Prepare(const float* row, size_t n, int8_t* memory) {
    DigitRow::Prepare(row, n, memory);
    float* to = reinterpret_cast<float*>(memory + DigitRow::Bytes(n));
    offsets = to;
    for (size_t g = 0; Exact() && g < n / kInt4Group; ++g) to[g] = OffsetOf(g);
#if SHADOWC_DIGITS
    if (Exact()) PairHalves(n, memory);
#endif
  }

  float OffsetOf(size_t g) const {
    const auto eights = hn::Set(GroupBytes(), 8);
    const int8_t* group = digits + g * kInt4Group;
#if SHADOWC_DIGITS
    const auto sums = GroupSums(eights, group, stride);
#else
    const auto sums = GroupSums(eights, eights, group, stride);
#endif
    const hn::RebindToFloat<GroupInts> df;
    return hn::ReduceSum(df, hn::ConvertTo(df, sums));
  }

  // Of every two groups the first halves, then the second halves, as LowAndHigh has the weights.
  void PairHalves(size_t n, int8_t* memory) {
    constexpr size_t kHalf = kInt4Group / 2;
    for (size_t digit = 0; digit < 3; ++digit) {
      for (size_t i = 0; i + 2 * kInt4Group <= n; i += 2 * kInt4Group) {
        int8_t* pair = memory + digit * stride + i;
        std::swap_ranges(pair + kHalf, pair + 2 * kHalf, pair + 2 * kHalf);
      }
    }
  }
};

#if SHADOWC_DIGITS

// The 64 values of a group as bytes, in order: the low halves of 32 pairs, then the high halves.
HWY_INLINE hn::Vec<hn::ScalableTag<uint8_t>> LoadGroup(const Int4Pair* pairs) {
  static_assert(HWY_MAX_BYTES == kInt4Group);
  const hn::ScalableTag<uint8_t> d8;
  const hn::Half<decltype(d8)> half;
  const auto both = hn::LoadU(half, &pairs->both);
  const auto whole = hn::Combine(d8, hn::ShiftRight<4>(both), both);
  return hn::And(whole, hn::Set(d8, 15));
}

// Two groups: all that lies in the low halves of their bytes, and in the high halves.
struct GroupPair {
  hn::Vec<hn::ScalableTag<uint8_t>> low, high;
};
HWY_INLINE GroupPair LowAndHigh(hn::Vec<hn::ScalableTag<uint8_t>> pairs) {
  const hn::ScalableTag<uint8_t> d8;
  const hn::Repartition<uint16_t, decltype(d8)> d16;
  const auto mask = hn::Set(d8, 15);
  const auto high = hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, pairs)));
  return {hn::And(pairs, mask), hn::And(high, mask)};
}

// Two neighbouring values, each in the half of the lanes that belongs to its group.
HWY_INLINE VF SpreadPair(const float* two) {
  alignas(64) static constexpr int32_t kFirstOrSecond[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  int64_t both;
  std::memcpy(&both, two, sizeof(both));
  return VF{
      _mm512_permutevar_ps(_mm512_castsi512_ps(_mm512_set1_epi64(both)), _mm512_load_si512(kFirstOrSecond))};
}

// One row with 4 weight rows.
HWY_INLINE void DotGroups(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n,
                          const Int4Pointer* later, float* out) {
  const DF df;
  const hn::ScalableTag<int8_t> d8;
  const hn::ScalableTag<int32_t> d32;
  const size_t groups = n / kInt4Group, stride = row.stride, lanes = hn::Lanes(df);
  const int8_t* HWY_RESTRICT digits = row.digits;
  const Int4Pointer w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  VF a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  size_t g = 0;
  for (; g + 2 <= groups; g += 2) {
    if (later != nullptr) PrefetchGroups([=](size_t c) HWY_ATTR { return later[c]; }, 4, g, groups);
    const int8_t* x = digits + g * kInt4Group;
    const auto load = [=](size_t digit, size_t half)
                          HWY_ATTR { return hn::LoadU(d8, x + digit * stride + half * kInt4Group); };
    const auto top0 = load(0, 0), top1 = load(0, 1), upper0 = load(1, 0), upper1 = load(1, 1);
    const auto all0 = load(2, 0), all1 = load(2, 1);
    const auto add = [=](const Int4Pointer& weights, VF sum) HWY_ATTR {
      const uint8_t* pairs = &weights.pairs[g * (kInt4Group / 2)].both;
      const auto [low, high] = LowAndHigh(hn::LoadU(hn::ScalableTag<uint8_t>(), pairs));
      // Eight elements in each lane: at most 8 * 15 * 2^23, which int32 holds.
      auto s = hn::SumOfMulQuadAccumulate(d32, low, top0, hn::Zero(d32));
      s = hn::ShiftLeft<8>(hn::SumOfMulQuadAccumulate(d32, high, top1, s));
      s = hn::SumOfMulQuadAccumulate(d32, low, upper0, s);
      s = hn::ShiftLeft<8>(hn::SumOfMulQuadAccumulate(d32, high, upper1, s));
      s = hn::SumOfMulQuadAccumulate(d32, low, all0, s);
      s = hn::SumOfMulQuadAccumulate(d32, high, all1, s);
      return hn::MulAdd(hn::ConvertTo(df, s), SpreadPair(weights.scales + g), sum);
    };
    a0 = add(w0, a0), a1 = add(w1, a1), a2 = add(w2, a2), a3 = add(w3, a3);
  }
  if (g < groups) {
    const auto add = [&](const Int4Pointer& weights, VF sum) HWY_ATTR {
      const auto bytes = LoadGroup(weights.pairs + g * (kInt4Group / 2));
      const auto sums = GroupSums(bytes, digits + g * kInt4Group, stride);
      return hn::MulAdd(hn::ConvertTo(df, sums), hn::Set(df, weights.scales[g]), sum);
    };
    a0 = add(w0, a0), a1 = add(w1, a1), a2 = add(w2, a2), a3 = add(w3, a3);
  }
  for (g = 0; g < groups; g += lanes) {
    const size_t m = HWY_MIN(lanes, groups - g);
    const VF offset = hn::LoadN(df, row.offsets + g, m);
    a0 = hn::NegMulAdd(hn::LoadN(df, w0.scales + g, m), offset, a0);
    a1 = hn::NegMulAdd(hn::LoadN(df, w1.scales + g, m), offset, a1);
    a2 = hn::NegMulAdd(hn::LoadN(df, w2.scales + g, m), offset, a2);
    a3 = hn::NegMulAdd(hn::LoadN(df, w3.scales + g, m), offset, a3);
  }
  Store4(out, a0, a1, a2, a3);
  for (size_t c = 0; c < 4; ++c) out[c] = static_cast<float>(out[c] * row.step);
}

#else

HWY_INLINE hn::Vec<GroupInts> PairSums(const Int4Pointer& w, size_t g, const int8_t* digits, size_t stride) {
  const GroupBytes d8;
  const hn::Repartition<uint16_t, GroupBytes> d16;
  const auto mask = hn::Set(d8, 15), pairs = hn::LoadU(d8, &w.pairs[g * (kInt4Group / 2)].both);
  const auto high = hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, pairs)));
  return GroupSums(hn::And(pairs, mask), hn::And(high, mask), digits + g * kInt4Group, stride);
}

// One row with 4 weight rows.
HWY_INLINE void DotGroups(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n,
                          const Int4Pointer* later, float* out) {
  const hn::RebindToFloat<GroupInts> df;
  const size_t groups = n / kInt4Group, stride = row.stride;
  const int8_t* HWY_RESTRICT digits = row.digits;
  const Int4Pointer w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  auto a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  for (size_t g = 0; g < groups; ++g) {
    if (later != nullptr && g % 2 == 0)
      PrefetchGroups([=](size_t c) HWY_ATTR { return later[c]; }, 4, g, groups);
    const auto add = [=](const Int4Pointer& weights, auto sum) HWY_ATTR {
      // The digits stay in memory: in registers they would push the weights out.
      std::atomic_signal_fence(std::memory_order_acq_rel);
      const auto sums = hn::ConvertTo(df, PairSums(weights, g, digits, stride));
      return hn::MulAdd(sums, hn::Set(df, weights.scales[g]), sum);
    };
    a0 = add(w0, a0), a1 = add(w1, a1), a2 = add(w2, a2), a3 = add(w3, a3);
  }
  for (size_t g = 0; g < groups; g += hn::Lanes(df)) {
    const size_t m = HWY_MIN(hn::Lanes(df), groups - g);
    const auto offset = hn::LoadN(df, row.offsets + g, m);
    a0 = hn::NegMulAdd(hn::LoadN(df, w0.scales + g, m), offset, a0);
    a1 = hn::NegMulAdd(hn::LoadN(df, w1.scales + g, m), offset, a1);
    a2 = hn::NegMulAdd(hn::LoadN(df, w2.scales + g, m), offset, a2);
    a3 = hn::NegMulAdd(hn::LoadN(df, w3.scales + g, m), offset, a3);
  }
  const auto store = [&](size_t c, auto sum)
                         HWY_ATTR { out[c] = static_cast<float>(hn::ReduceSum(df, sum) * row.step); };
  store(0, a0), store(1, a1), store(2, a2), store(3, a3);
}

#endif  // SHADOWC_DIGITS

template <size_t kRows>
HWY_INLINE void DotRows(const Activations<Int4Pair>* const* rows, const Int4Pointer* w, size_t n,
                        const Int4Pointer* later, float* out, size_t out_stride) {
  for (size_t r = 0; r < kRows; ++r) {
    if (rows[r]->Exact()) {
      DotGroups(*rows[r], w, n, r == 0 ? later : nullptr, out + r * out_stride);
    } else {
      DotTile<1>(&rows[r]->x, w[0], w[1], w[2], w[3], n, r == 0 ? later : nullptr, out + r * out_stride,
                 out_stride);
    }
  }
}

#endif  // SHADOWC_DIGITS || SHADOWC_PAIRS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
