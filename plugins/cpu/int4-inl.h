// SPDX-License-Identifier: Apache-2.0
// Products with int4 weight rows, once per SIMD target.
//
// Unpacking to floats costs seven instructions for every vector of weights, several times what their bytes
// cost. With AVX-512 two groups of 64 weights are one register of bytes instead: products are taken with the
// digits of x (see digits-inl.h), and the second kind with the digits of the factors (int4_sum-inl.h). The
// high halves are not cut out: a byte is low + 16 * high, and what low adds to a product with it is taken
// back in the product with low alone. With AVX2 one group is two registers, and products of two bytes
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
// than PrefetchRows on Zen 4: these kernels are bound by instructions. There two rounds take 1.01 to 1.02 of
// the time of three (a dense FFN from memory), one 1.05 and 1.06, none 1.65. On an Intel core with VNNI one
// round in place of three takes 0.77 to 0.99 of a call's time (of twelve measured one took 1.18), none 1.1
// to 1.9.
template <class Row>
HWY_INLINE void PrefetchGroups(Row later, size_t count, size_t g, size_t groups) {
  constexpr size_t kRounds = HWY_TARGET == HWY_AVX3_ZEN4 || SHADOWC_PAIRS ? 3 : 1;
  InRounds<kRounds>(count, [=](size_t c) HWY_ATTR { PrefetchL2(later(c).pairs + g * (kInt4Group / 2)); });
  for (size_t c = 0; g == 0 && c < count; ++c) {
    for (size_t s = 0; s < groups; s += kLine / sizeof(float)) PrefetchL2(later(c).scales + s);
  }
}

// The same of row c alone, where kPrefetchOneByOne. Eight rows fetch their scales in eight different steps.
HWY_INLINE void PrefetchGroupsOf(Int4Pointer row, size_t c, size_t g, size_t groups) {
  const size_t step = g / 2, steps = (groups + 1) / 2;
  PrefetchL2(row.pairs + g * (kInt4Group / 2));
  if (step == std::min(step / 8 * 8 + c % 8, steps - 1)) PrefetchL2(row.scales + step / 8 * 16);
}

#if SHADOWC_DIGITS || SHADOWC_PAIRS

#if SHADOWC_DIGITS

using GroupBytes = hn::ScalableTag<uint8_t>;  // 64, of two groups
using GroupInts = hn::Repartition<int32_t, GroupBytes>;
using PairBytes = hn::Vec<GroupBytes>;

// A row for products with pairs: where the low half of a pair meets x and the high half z, (low + 16 high) P
// + low Q with P = z / (16 step) and Q = x / step - P, both in three digits. So z has 20 bits, x has 24.
// Where P has two digits, which leaves five products of six, they have 16 and 20.
template <>
struct Activations<Int4Pair> {
  const float* x = nullptr;
  const int8_t* digits = nullptr;  // [P and Q, 3, stride], most significant first, zeros behind the last pair
  size_t stride = 0;
  const float* offsets = nullptr;  // [groups], 8 * sum of x / step: weights are stored plus 8
  double step = 0.0;
  size_t places = 3;  // digits of P that are not zero: the last ones

  static size_t Stride(size_t n) { return hwy::RoundUpTo(n / 2, hn::Lanes(GroupBytes())); }
  static size_t Bytes(size_t n) { return 6 * Stride(n) + n / kInt4Group * sizeof(float); }
  // `memory` holds Bytes(n).
  void Prepare(const float* row, size_t n, int8_t* memory, Int4Digits allowed) {
    x = row;
    digits = memory;
    stride = Stride(n);
    float* to = reinterpret_cast<float*>(memory + 6 * stride);
    offsets = to;
    const float largest = LargestOf(row, n);
    exact_ = n <= kMostInDigits && HasDigits(largest);
    if (!exact_) return;
    places = allowed == Int4Digits::kTwo ? 2 : 3;
    const float reach = places == 2 ? kMostInTwo : kMost;
    step = largest / reach;
    for (size_t i = n / 2; i < stride; ++i) {
      for (size_t plane = 0; plane < 6; ++plane) memory[plane * stride + i] = 0;
    }
    for (size_t g = 0; g < n / kInt4Group; ++g) SplitGroup(g, reach / largest, memory);
    for (size_t g = 0; g < n / kInt4Group; ++g) to[g] = OffsetOf(g);
  }
  bool Exact() const { return exact_; }  // as DigitRow

 private:
  // The largest Q is 17 / 16 of kMost, the largest P a sixteenth of kMostInTwo.
  static constexpr float kMost = kMostDigits * 16 / 17, kMostInTwo = kMostTwoDigits * 16;
  bool exact_ = false;

  void SplitGroup(size_t g, float scale, int8_t* to) const;
  float OffsetOf(size_t g) const;
};

// The digits that 64 pairs meet.
struct PairDigits {
  hn::Vec<hn::ScalableTag<int8_t>> p[3], q[3];

  HWY_INLINE PairDigits(const Activations<Int4Pair>& row, size_t g) {
    const hn::ScalableTag<int8_t> d8;
    const int8_t* from = row.digits + g * (kInt4Group / 2);
    HWY_UNROLL(3)
    for (size_t digit = 0; digit < 3; ++digit) {
      p[digit] = hn::LoadU(d8, from + digit * row.stride);
      q[digit] = hn::LoadU(d8, from + (3 + digit) * row.stride);
    }
  }
};

HWY_INLINE PairBytes LowHalves(PairBytes pairs) { return hn::And(pairs, hn::Set(GroupBytes(), 15)); }

// Sums of products, of four pairs in each lane: at most 8 * 15 * 2^23, which int32 holds. P has kPlaces
// digits.
template <size_t kPlaces>
HWY_INLINE hn::Vec<GroupInts> PairSums(PairBytes pairs, const PairDigits& x) {
  const GroupInts d32;
  const auto low = LowHalves(pairs);
  auto sums = hn::Zero(d32);
  HWY_UNROLL(3)
  for (size_t digit = 0; digit < 3; ++digit) {
    if (digit != 0) sums = hn::ShiftLeft<8>(sums);
    if (digit >= 3 - kPlaces) sums = hn::SumOfMulQuadAccumulate(d32, pairs, x.p[digit], sums);
    sums = hn::SumOfMulQuadAccumulate(d32, low, x.q[digit], sums);
  }
  return sums;
}

inline void Activations<Int4Pair>::SplitGroup(size_t g, float scale, int8_t* to) const {
  const DF df;
  const hn::RebindToSigned<DF> di;
  const hn::RebindToUnsigned<DF> du;
  const hn::Rebind<uint8_t, DF> d8;
  const auto half = hn::Set(di, 128);
  const auto store = [&](auto all, int8_t* planes) HWY_ATTR {
    const auto upper = hn::ShiftRight<8>(hn::Add(all, half)), top = hn::ShiftRight<8>(hn::Add(upper, half));
    const auto plane = [&](auto digit, size_t place) HWY_ATTR {
      hn::StoreU(hn::TruncateTo(d8, hn::BitCast(du, digit)), d8,
                 reinterpret_cast<uint8_t*>(planes) + place * stride);
    };
    plane(top, 0), plane(upper, 1), plane(all, 2);
  };
  for (size_t i = 0; i < kInt4Group / 2; i += hn::Lanes(df)) {
    const float *low = x + g * kInt4Group + i, *high = low + kInt4Group / 2;
    const auto p = hn::NearestInt(hn::Mul(hn::LoadU(df, high), hn::Set(df, scale / 16)));
    const auto q = hn::Sub(hn::NearestInt(hn::Mul(hn::LoadU(df, low), hn::Set(df, scale))), p);
    int8_t* planes = to + g * (kInt4Group / 2) + i;
    store(p, planes), store(q, planes + 3 * stride);
  }
}

inline float Activations<Int4Pair>::OffsetOf(size_t g) const {
  const GroupBytes d8;
  const auto first = hn::FirstN(d8, kInt4Group / 2), mine = g % 2 == 0 ? first : hn::Not(first);
  const auto eights = hn::IfThenElseZero(mine, hn::Set(d8, 0x88));
  const hn::RebindToFloat<GroupInts> df;
  return hn::ReduceSum(df, hn::ConvertTo(df, PairSums<3>(eights, PairDigits(*this, g / 2 * 2))));
}

// Two neighbouring values, each in the half of the lanes that belongs to its group.
HWY_INLINE VF SpreadPair(const float* two) {
  alignas(64) static constexpr int32_t kFirstOrSecond[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  int64_t both;
  std::memcpy(&both, two, sizeof(both));
  return VF{
      _mm512_permutevar_ps(_mm512_castsi512_ps(_mm512_set1_epi64(both)), _mm512_load_si512(kFirstOrSecond))};
}

// One row, whose P has kPlaces digits, with 4 weight rows.
template <size_t kPlaces>
HWY_INLINE void DotGroups(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n,
                          const Int4Pointer* later, float* out) {
  const DF df;
  const GroupBytes d8;
  const size_t groups = n / kInt4Group, lanes = hn::Lanes(df);
  const Int4Pointer w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  VF a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  const auto at = [](const Int4Pointer& weights, size_t g)
                      HWY_ATTR { return &weights.pairs[g * (kInt4Group / 2)].both; };
  size_t g = 0;
  for (; g + 2 <= groups; g += 2) {
    if (!kPrefetchOneByOne && later != nullptr)
      PrefetchGroups([=](size_t c) HWY_ATTR { return later[c]; }, 4, g, groups);
    const PairDigits x(row, g);
    const auto add = [&](const Int4Pointer& weights, size_t c, VF sum) HWY_ATTR {
      if (kPrefetchOneByOne && later != nullptr) PrefetchGroupsOf(later[c], c, g, groups);
      const auto sums = PairSums<kPlaces>(hn::LoadU(d8, at(weights, g)), x);
      return hn::MulAdd(hn::ConvertTo(df, sums), SpreadPair(weights.scales + g), sum);
    };
    a0 = add(w0, 0, a0), a1 = add(w1, 1, a1), a2 = add(w2, 2, a2), a3 = add(w3, 3, a3);
  }
  if (g < groups) {
    const PairDigits x(row, g);
    const auto add = [&](const Int4Pointer& weights, size_t c, VF sum) HWY_ATTR {
      if (kPrefetchOneByOne && later != nullptr) PrefetchGroupsOf(later[c], c, g, groups);
      const auto sums = PairSums<kPlaces>(hn::LoadN(d8, at(weights, g), kInt4Group / 2), x);
      return hn::MulAdd(hn::ConvertTo(df, sums), hn::Set(df, weights.scales[g]), sum);
    };
    a0 = add(w0, 0, a0), a1 = add(w1, 1, a1), a2 = add(w2, 2, a2), a3 = add(w3, 3, a3);
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

using GroupBytes = hn::FixedTag<uint8_t, kInt4Group / 2>;
using GroupInts = hn::Repartition<int32_t, GroupBytes>;

// Sums of one group's weights * X, in some order spread over the lanes. At most 8 * 15 * 2^23 in a lane,
// which int32 holds. `low` and `high`: the group's first and second half. X has kPlaces digits.
template <size_t kPlaces>
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
  if constexpr (kPlaces == 2) return hn::Add(hn::WidenMulPairwiseAdd(d32, fours(1), place), all);
  const auto upper =
      hn::Add(hn::WidenMulPairwiseAdd(d32, fours(0), place), hn::WidenMulPairwiseAdd(d32, fours(1), one));
  return hn::Add(hn::ShiftLeft<8>(upper), all);
}

template <>
struct Activations<Int4Pair> : DigitRow {
  size_t places = 3;               // digits of X that are not zero: the last ones
  const float* offsets = nullptr;  // [groups], 8 * sum of X in the group: weights are stored plus 8

  static size_t Bytes(size_t n) { return DigitRow::Bytes(n) + n / kInt4Group * sizeof(float); }
  void Prepare(const float* row, size_t n, int8_t* memory, Int4Digits allowed) {
    places = allowed == Int4Digits::kTwo ? 2 : 3;
    DigitRow::Prepare(row, n, memory, places == 2 ? kMostTwoDigits : kMostDigits);
    float* to = reinterpret_cast<float*>(memory + DigitRow::Bytes(n));
    offsets = to;
    for (size_t g = 0; Exact() && g < n / kInt4Group; ++g) to[g] = OffsetOf(g);
  }

  float OffsetOf(size_t g) const {
    const auto eights = hn::Set(GroupBytes(), 8);
    const int8_t* group = digits + g * kInt4Group;
    const auto sums = GroupSums<3>(eights, eights, group, stride);
    const hn::RebindToFloat<GroupInts> df;
    return hn::ReduceSum(df, hn::ConvertTo(df, sums));
  }
};

template <size_t kPlaces>
HWY_INLINE hn::Vec<GroupInts> PairSums(const Int4Pointer& w, size_t g, const int8_t* digits, size_t stride) {
  const GroupBytes d8;
  const hn::Repartition<uint16_t, GroupBytes> d16;
  const auto mask = hn::Set(d8, 15), pairs = hn::LoadU(d8, &w.pairs[g * (kInt4Group / 2)].both);
  const auto high = hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, pairs)));
  return GroupSums<kPlaces>(hn::And(pairs, mask), hn::And(high, mask), digits + g * kInt4Group, stride);
}

// One row, of kPlaces digits, with 4 weight rows.
template <size_t kPlaces>
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
      const auto sums = hn::ConvertTo(df, PairSums<kPlaces>(weights, g, digits, stride));
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
    const Int4Pointer* fetched = r == 0 ? later : nullptr;
    float* to = out + r * out_stride;
    if (rows[r]->Exact() && rows[r]->places == 2) {
      DotGroups<2>(*rows[r], w, n, fetched, to);
    } else if (rows[r]->Exact()) {
      DotGroups<3>(*rows[r], w, n, fetched, to);
    } else {
      DotTile<1>(&rows[r]->x, w[0], w[1], w[2], w[3], n, fetched, to, out_stride);
    }
  }
}

#endif  // SHADOWC_DIGITS || SHADOWC_PAIRS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
