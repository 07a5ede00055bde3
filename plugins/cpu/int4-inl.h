// SPDX-License-Identifier: Apache-2.0
// Products with int4 weight rows, once per SIMD target.
//
// Unpacking to floats costs seven instructions for every vector of weights, several times what their bytes
// cost. With AVX-512 two groups of 64 weights are one register of bytes instead: products are taken with the
// digits of x (see digits-inl.h), and the second kind with the digits of the factors (int4_sum-inl.h). The
// high halves are not cut out, but for rounded rows: a byte is low + 16 * high, and what low adds to a
// product with it is taken back in the product with low alone. Without AVX-512: int4_avx2-inl.h.

#if defined(SHADOWC_CPU_INT4_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_INL_H_
#undef SHADOWC_CPU_INT4_INL_H_
#else
#define SHADOWC_CPU_INT4_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "digits-inl.h"
#include "int4_avx2-inl.h"
#include "int4_fetch-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

#if SHADOWC_DIGITS || SHADOWC_PAIRS

#if SHADOWC_DIGITS

using GroupBytes = hn::ScalableTag<uint8_t>;  // 64, of two groups
using GroupInts = hn::Repartition<int32_t, GroupBytes>;
using PairBytes = hn::Vec<GroupBytes>;

// A row for products with pairs: where the low half of a pair meets x and the high half z, (low + 16 high) P
// + low Q with P = z / (16 step) and Q = x / step - P, both in three digits. So z has 20 bits, x has 24.
// A row that is rounded has the 8 bits of both, in steps of each group.
template <>
struct Activations<Int4Pair> {
  const float* x = nullptr;
  // [P and Q, 3, stride], most significant first, zeros behind the last pair; rounded: [low and high,
  // stride].
  const int8_t* digits = nullptr;
  size_t stride = 0;
  const float* offsets = nullptr;  // [groups], 8 * sum of x / step (rounded: of x): weights are stored plus 8
  const float* steps = nullptr;    // [groups]; null: not rounded, all have this step
  double step = 0.0;

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
    const bool round = allowed == Int4Digits::kOne;
    for (size_t plane = 0; plane < (round ? 2 : 6); ++plane)
      std::fill(memory + plane * stride + n / 2, memory + (plane + 1) * stride, int8_t{0});
    if (round) return Round(n, memory, to);
    step = largest / kMost;
    for (size_t g = 0; g < n / kInt4Group; ++g) SplitGroup(g, kMost / largest, memory);
    for (size_t g = 0; g < n / kInt4Group; ++g) to[g] = OffsetOf(g);
  }
  bool Exact() const { return exact_; }  // as DigitRow

 private:
  static constexpr float kMost = kMostDigits * 16 / 17;  // the largest Q is 17 / 16 of it
  bool exact_ = false;

  void Round(size_t n, int8_t* memory, float* to) {
    float* group_steps = reinterpret_cast<float*>(memory + 2 * stride);
    steps = group_steps;
    for (size_t g = 0; g < n / kInt4Group; ++g) {
      int8_t* low = memory + g * (kInt4Group / 2);
      RoundGroup(x + g * kInt4Group, low, low + stride, group_steps + g, to + g);
    }
  }
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
      p[digit] = InRegister(hn::LoadU(d8, from + digit * row.stride));
      q[digit] = InRegister(hn::LoadU(d8, from + (3 + digit) * row.stride));
    }
  }
};

HWY_INLINE PairBytes LowHalves(PairBytes pairs) { return hn::And(pairs, hn::Set(GroupBytes(), 15)); }

// Sums of products, of four pairs in each lane: at most 8 * 15 * 2^23, which int32 holds.
HWY_INLINE hn::Vec<GroupInts> PairSums(PairBytes pairs, const PairDigits& x) {
  const GroupInts d32;
  const auto low = LowHalves(pairs);
  auto sums = hn::Zero(d32);
  HWY_UNROLL(3)
  for (size_t digit = 0; digit < 3; ++digit) {
    if (digit != 0) sums = hn::ShiftLeft<8>(sums);
    sums = hn::SumOfMulQuadAccumulate(d32, pairs, x.p[digit], sums);
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
  return hn::ReduceSum(df, hn::ConvertTo(df, PairSums(eights, PairDigits(*this, g / 2 * 2))));
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
template <class Fetch>
HWY_INLINE void DotGroups(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n, Fetch fetch,
                          float* out) {
  const DF df;
  const GroupBytes d8;
  const size_t groups = n / kInt4Group, lanes = hn::Lanes(df);
  const Int4Pointer w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  VF a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  const auto at = [](const Int4Pointer& weights, size_t g)
                      HWY_ATTR { return &weights.pairs[g * (kInt4Group / 2)].both; };
  size_t g = 0;
  for (; g + 2 <= groups; g += 2) {
    const PairDigits x(row, g);
    const auto step = fetch.At(g);
    const auto add = [&](const Int4Pointer& weights, size_t c, VF sum) HWY_ATTR {
      step(c);
      const auto sums = PairSums(InRegister(hn::LoadU(d8, at(weights, g))), x);
      return hn::MulAdd(hn::ConvertTo(df, sums), SpreadPair(weights.scales + g), sum);
    };
    a0 = add(w0, 0, a0), a1 = add(w1, 1, a1), a2 = add(w2, 2, a2), a3 = add(w3, 3, a3);
  }
  if (g < groups) {
    const PairDigits x(row, g);
    const auto step = fetch.At(g);
    const auto add = [&](const Int4Pointer& weights, size_t c, VF sum) HWY_ATTR {
      step(c);
      const auto sums = PairSums(hn::LoadN(d8, at(weights, g), kInt4Group / 2), x);
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

// Number 2 * i and the one behind it of 16 values, each in the half of the lanes that belongs to its group.
struct SpreadOrder {
  alignas(64) int32_t of[8][16];
  constexpr SpreadOrder() : of() {
    for (int32_t i = 0; i < 8; ++i)
      for (int32_t lane = 0; lane < 16; ++lane) of[i][lane] = 2 * i + lane / 8;
  }
};
inline constexpr SpreadOrder kSpreadOrder;

// One rounded row with 4 weight rows.
template <class Fetch>
HWY_INLINE void DotRounded(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n, Fetch fetch,
                           float* out) {
  const DF df;
  const GroupBytes d8;
  const GroupInts d32;
  const hn::Repartition<int8_t, GroupBytes> di8;
  const hn::Repartition<uint16_t, GroupBytes> d16;
  const size_t groups = n / kInt4Group, lanes = hn::Lanes(df);
  const Int4Pointer w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  const auto at = [](const Int4Pointer& weights, size_t g)
                      HWY_ATTR { return &weights.pairs[g * (kInt4Group / 2)].both; };
  VF a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  for (size_t first = 0; first < groups; first += lanes) {
    const size_t here = HWY_MIN(lanes, groups - first);
    const VF steps = hn::LoadN(df, row.steps + first, here),
             offset = hn::LoadN(df, row.offsets + first, here);
    const auto scales = [=](const Int4Pointer& weights)
                            HWY_ATTR { return hn::LoadN(df, weights.scales + first, here); };
    VF s0 = scales(w0), s1 = scales(w1), s2 = scales(w2), s3 = scales(w3);
    a0 = hn::NegMulAdd(s0, offset, a0), a1 = hn::NegMulAdd(s1, offset, a1);
    a2 = hn::NegMulAdd(s2, offset, a2), a3 = hn::NegMulAdd(s3, offset, a3);
    s0 = hn::Mul(s0, steps), s1 = hn::Mul(s1, steps), s2 = hn::Mul(s2, steps), s3 = hn::Mul(s3, steps);
    for (size_t g = first; g < first + here; g += 2) {
      const int8_t* from = row.digits + g * (kInt4Group / 2);
      const auto low = InRegister(hn::LoadU(di8, from)), high = InRegister(hn::LoadU(di8, from + row.stride));
      const auto order = hn::SetTableIndices(df, kSpreadOrder.of[(g - first) / 2]);
      const auto add = [=](PairBytes loaded, VF scale, VF sum) HWY_ATTR {
        const PairBytes pairs = InRegister(loaded);
        const auto halves = hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, pairs)));
        auto sums = hn::SumOfMulQuadAccumulate(d32, LowHalves(pairs), low, hn::Zero(d32));
        sums = hn::SumOfMulQuadAccumulate(d32, LowHalves(halves), high, sums);
        return hn::MulAdd(hn::ConvertTo(df, sums), hn::TableLookupLanes(scale, order), sum);
      };
      const auto step = fetch.At(g);
      if (HWY_UNLIKELY(g + 1 == groups)) {
        step(0), step(1), step(2), step(3);
        const auto load = [=](const uint8_t* p) HWY_ATTR { return hn::LoadN(d8, p, kInt4Group / 2); };
        a0 = add(load(at(w0, g)), s0, a0), a1 = add(load(at(w1, g)), s1, a1);
        a2 = add(load(at(w2, g)), s2, a2), a3 = add(load(at(w3, g)), s3, a3);
        break;
      }
      step(0), a0 = add(hn::LoadU(d8, at(w0, g)), s0, a0);
      step(1), a1 = add(hn::LoadU(d8, at(w1, g)), s1, a1);
      step(2), a2 = add(hn::LoadU(d8, at(w2, g)), s2, a2);
      step(3), a3 = add(hn::LoadU(d8, at(w3, g)), s3, a3);
    }
  }
  Store4(out, a0, a1, a2, a3);
}

#endif  // SHADOWC_DIGITS

// One row that has digits with 4 weight rows. fetch.At(g) is called before groups g and g + 1 are read, and
// what it gives with c before row c is.
template <class Fetch>
HWY_INLINE void DotDigits(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n, Fetch fetch,
                          float* out) {
  if (row.steps != nullptr) return DotRounded(row, w, n, fetch, out);
  DotGroups(row, w, n, fetch, out);
}

template <size_t kRows>
HWY_INLINE void DotRows(const Activations<Int4Pair>* const* rows, const Int4Pointer* w, size_t n,
                        const Int4Pointer* later, float* out, size_t out_stride) {
  for (size_t r = 0; r < kRows; ++r) {
    const Int4Pointer* fetched = r == 0 ? later : nullptr;
    float* to = out + r * out_stride;
    if (rows[r]->Exact()) {
      DotDigits(*rows[r], w, n, GroupFetch{fetched, n / kInt4Group}, to);
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
