// SPDX-License-Identifier: Apache-2.0
// Products with int4 weight rows, and int4 weight rows added to rows of y, once per SIMD target.
//
// Unpacking to floats costs seven instructions for every sixteen weights, several times what their bytes
// cost. With AVX-512 a group of 64 weights is one register of bytes instead: products are taken with the
// digits of x (see digits-inl.h), and the second kind looks h * scale * value up in a register that holds it
// for all 16 values.

#if defined(SHADOWC_CPU_INT4_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_INL_H_
#undef SHADOWC_CPU_INT4_INL_H_
#else
#define SHADOWC_CPU_INT4_INL_H_
#endif

#include "digits-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// Fetches a later row's bytes of group g, and its scales with the first group.
HWY_INLINE void PrefetchGroup(const Int4Pointer& later, size_t g, size_t groups) {
  if (g % 2 == 0) PrefetchL2(later.pairs + g * (kInt4Group / 2));
  if (g != 0) return;
  for (size_t s = 0; s < groups; s += kLine / sizeof(float)) PrefetchL2(later.scales + s);
}

#if SHADOWC_DIGITS

template <>
struct Activations<Int4Pair> : DigitRow {
  static constexpr bool kDigits = false;  // four rows at a time are better, see WholeRecords
  const float* offsets = nullptr;         // [groups], 8 * sum of X in the group: weights are stored plus 8

  static size_t Bytes(size_t n) { return DigitRow::Bytes(n) + n / kInt4Group * sizeof(float); }
  void Prepare(const float* row, size_t n, int8_t* memory) {
    DigitRow::Prepare(row, n, memory);
    float* to = reinterpret_cast<float*>(memory + DigitRow::Bytes(n));
    offsets = to;
    const auto eights = hn::Set(hn::ScalableTag<uint8_t>(), 8);
    for (size_t g = 0; Exact() && g < n / kInt4Group; ++g) {
      to[g] = hn::ReduceSum(DF(), hn::ConvertTo(DF(), GroupSums(eights, digits + g * kInt4Group, stride)));
    }
  }

  // Sums of weights * X, four elements in each lane: at most 4 * 15 * 2^23, which int32 holds.
  static HWY_INLINE hn::Vec<hn::ScalableTag<int32_t>> GroupSums(hn::Vec<hn::ScalableTag<uint8_t>> weights,
                                                                const int8_t* digits, size_t stride) {
    const hn::ScalableTag<int8_t> d8;
    const hn::ScalableTag<int32_t> d32;
    auto sums = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits), hn::Zero(d32));
    sums = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits + stride), hn::ShiftLeft<8>(sums));
    return hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits + 2 * stride),
                                      hn::ShiftLeft<8>(sums));
  }
};

// The 64 values of a group as bytes, in order: the low halves of 32 pairs, then the high halves.
HWY_INLINE hn::Vec<hn::ScalableTag<uint8_t>> LoadGroup(const Int4Pair* pairs) {
  static_assert(HWY_MAX_BYTES == kInt4Group);
  const hn::ScalableTag<uint8_t> d8;
  const hn::Half<decltype(d8)> half;
  const auto both = hn::LoadU(half, &pairs->both);
  const auto whole = hn::Combine(d8, hn::ShiftRight<4>(both), both);
  return hn::And(whole, hn::Set(d8, 15));
}

// One row with 4 weight rows.
HWY_INLINE void DotGroups(const Activations<Int4Pair>& row, const Int4Pointer* w, size_t n,
                          const Int4Pointer* later, float* out) {
  const DF df;
  const size_t groups = n / kInt4Group, stride = row.stride, lanes = hn::Lanes(df);
  const int8_t* HWY_RESTRICT digits = row.digits;
  const Int4Pointer w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  VF a0 = hn::Zero(df), a1 = a0, a2 = a0, a3 = a0;
  const auto add = [&](const Int4Pointer& weights, size_t g, VF sum) HWY_ATTR {
    const auto bytes = LoadGroup(weights.pairs + g * (kInt4Group / 2));
    const auto sums = Activations<Int4Pair>::GroupSums(bytes, digits + g * kInt4Group, stride);
    return hn::MulAdd(hn::ConvertTo(df, sums), hn::Set(df, weights.scales[g]), sum);
  };
  for (size_t g = 0; g < groups; ++g) {
    if (later != nullptr) {
      for (size_t c = 0; c < 4; ++c) PrefetchGroup(later[c], g, groups);
    }
    a0 = add(w0, g, a0), a1 = add(w1, g, a1), a2 = add(w2, g, a2), a3 = add(w3, g, a3);
  }
  for (size_t g = 0; g < groups; g += lanes) {
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

template <size_t kRows, size_t kWeights>
HWY_INLINE void DotRows(const Activations<Int4Pair>* const* rows, const Int4Pointer* w, size_t n,
                        const Int4Pointer* later, float* out, size_t out_stride) {
  static_assert(kWeights == 4);
  for (size_t r = 0; r < kRows; ++r) {
    if (rows[r]->Exact()) {
      DotGroups(*rows[r], w, n, r == 0 ? later : nullptr, out + r * out_stride);
    } else {
      DotTile<1>(&rows[r]->x, w[0], w[1], w[2], w[3], n, r == 0 ? later : nullptr, out + r * out_stride,
                 out_stride);
    }
  }
}

// As AxpyTile, for one row.
template <class Row, class Later>
HWY_INLINE void AxpyGroups(float* HWY_RESTRICT y, Row row, size_t count, const float* h, size_t n,
                           size_t later_count, Later later) {
  const DF df;
  const hn::RebindToSigned<DF> d32;
  const hn::Rebind<uint8_t, DF> d8;
  const size_t lanes = hn::Lanes(df), groups = n / kInt4Group;
  const VF values = hn::ConvertTo(df, hn::Sub(hn::Iota(d32, 0), hn::Set(d32, 8)));
  for (size_t g = 0; g < groups; ++g, y += kInt4Group) {
    for (size_t k = 0; k < later_count; ++k) PrefetchGroup(later(k), g, groups);
    VF a0 = hn::LoadU(df, y), a1 = hn::LoadU(df, y + lanes);
    VF a2 = hn::LoadU(df, y + 2 * lanes), a3 = hn::LoadU(df, y + 3 * lanes);
    for (size_t k = 0; k < count; ++k) {
      const Int4Pointer w = row(k);
      const uint8_t* pairs = &w.pairs[g * (kInt4Group / 2)].both;
      const VF table = hn::Mul(values, hn::Set(df, h[k] * w.scales[g]));
      // Only the lowest four bits of an index count.
      const auto first = hn::PromoteTo(d32, hn::LoadU(d8, pairs));
      const auto second = hn::PromoteTo(d32, hn::LoadU(d8, pairs + lanes));
      const auto look_up = [&](auto index)
                               HWY_ATTR { return VF{_mm512_permutexvar_ps(index.raw, table.raw)}; };
      a0 = hn::Add(a0, look_up(first)), a1 = hn::Add(a1, look_up(second));
      a2 = hn::Add(a2, look_up(hn::ShiftRight<4>(first))),
      a3 = hn::Add(a3, look_up(hn::ShiftRight<4>(second)));
    }
    hn::StoreU(a0, df, y), hn::StoreU(a1, df, y + lanes);
    hn::StoreU(a2, df, y + 2 * lanes), hn::StoreU(a3, df, y + 3 * lanes);
  }
}

template <size_t kRows, class Row, class Later>
HWY_INLINE void AxpyRows(float* const* y, Row row, size_t count, const float* h, size_t h_stride, size_t n,
                         size_t later_count, Later later) {
  if constexpr (std::is_same_v<decltype(row(0)), Int4Pointer>) {
    for (size_t r = 0; r < kRows; ++r)
      AxpyGroups(y[r], row, count, h + r * h_stride, n, r == 0 ? later_count : 0, later);
  } else {
    AxpyTile<kRows>(y, row, count, h, h_stride, n, later_count, later);
  }
}

#else

template <size_t kRows, class Row, class Later>
HWY_INLINE void AxpyRows(float* const* y, Row row, size_t count, const float* h, size_t h_stride, size_t n,
                         size_t later_count, Later later) {
  AxpyTile<kRows>(y, row, count, h, h_stride, n, later_count, later);
}

#endif  // SHADOWC_DIGITS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
