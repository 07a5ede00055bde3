// SPDX-License-Identifier: Apache-2.0
// The second product of PredictUnits with int8 weights, once per SIMD target. Its rows are as short as the
// network is narrow: adding up a sum across a vector would take longer than the products. So 16 rows lie side
// by side, four weights of each at a time [ceil(N / 16), ceil(P / 4), 16, 4], and every lane sums one row.

#if defined(SHADOWC_CPU_QUADS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_QUADS_INL_H_
#undef SHADOWC_CPU_QUADS_INL_H_
#else
#define SHADOWC_CPU_QUADS_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "digits-inl.h"
#include "predict_units.h"
#include "product-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// Int8 weights as they lie here, for Activations.
struct QuadWeight {};

#if SHADOWC_DIGITS

template <>
struct Activations<QuadWeight> : Activations<int8_t> {};

#elif SHADOWC_PAIRS

// The integers of a row (digits-inl.h) in two balanced digits of base 4096: X = 4096 a + b, of 16 bits each.
// Without 8-bit dot products that is the shortest exact way: 10 instructions for 32 weights, where floats
// take 15 and wait for each other.
template <>
struct Activations<QuadWeight> {
  const float* x = nullptr;
  const int16_t* digits = nullptr;  // a and b of four values after another, zeros behind the last
  float step = 0.0f;                // x is about step * X

  static constexpr int kDigitBits = 12;
  // 4096 products of at most 128 * 2048 in an int32.
  static constexpr size_t kMost = 4096;

  static size_t Bytes(size_t n) { return hwy::RoundUpTo(n, hn::Lanes(DF())) * 2 * sizeof(int16_t); }
  void Prepare(const float* row, size_t n, int8_t* memory, Int4Digits) {
    x = row;
    digits = reinterpret_cast<int16_t*>(memory);
    const float largest = LargestOf(x, n);
    exact_ = n <= kMost && HasDigits(largest);
    if (!exact_) return;
    step = largest / kMostDigits;
    Split(n, kMostDigits / largest, reinterpret_cast<int16_t*>(memory));
  }
  bool Exact() const { return exact_; }  // as DigitRow

 private:
  bool exact_ = false;

  void Split(size_t n, float scale, int16_t* to) const {
    const DF df;
    const hn::RebindToSigned<DF> d32;
    const hn::Rebind<int16_t, DF> d16;
    const size_t lanes = hn::Lanes(df);
    const auto half = hn::Set(d32, 1 << (kDigitBits - 1));
    alignas(64) int16_t upper[hn::MaxLanes(d16)], lower[hn::MaxLanes(d16)];
    for (size_t i = 0; i < n; i += lanes) {
      const auto all =
          hn::NearestInt(hn::Mul(hn::LoadN(df, x + i, HWY_MIN(lanes, n - i)), hn::Set(df, scale)));
      const auto a = hn::ShiftRight<kDigitBits>(hn::Add(all, half));
      hn::Store(hn::DemoteTo(d16, a), d16, upper);
      hn::Store(hn::DemoteTo(d16, hn::Sub(all, hn::ShiftLeft<kDigitBits>(a))), d16, lower);
      for (size_t q = 0; q < lanes; q += 4, to += 8) {
        std::copy_n(upper + q, 4, to);
        std::copy_n(lower + q, 4, to + 4);
      }
    }
  }
};

#endif

class Quads {
 public:
  Quads(const PredictArgs& a, size_t hidden)
      : w_(static_cast<const int8_t*>(a.w2)),
        scales_(a.scales2),
        bias_(a.b2),
        quads_(hidden / 4),
        outputs_(a.units),
        groups_((a.units + kRows - 1) / kRows),
        together_(Fours(kTaskBytes, quads_ * kLine)) {}

  size_t Tasks() const { return (groups_ + together_ - 1) / together_; }

  // What a thread reads first.
  void Prefetch(size_t task) const {
    const size_t from = task * together_ * quads_ * kLine, end = groups_ * quads_ * kLine;
    PrefetchStep(w_ + from, std::min(kTaskAheadBytes, end - from));
  }

  // x and y point to the first of the rows.
  void Run(size_t task, const Activations<QuadWeight>* x, size_t rows, float* y) const {
    const size_t begin = task * together_, end = std::min(groups_, begin + together_);
    for (size_t g = begin; g < end; g += kTogether) {
      for (size_t r = 0; r < rows; ++r) FourGroups(g, x[r], rows, r == 0, y + r * outputs_);
    }
  }

 private:
  static constexpr size_t kRows = 16, kTogether = 4;

  void FourGroups(size_t first, const Activations<QuadWeight>& x, [[maybe_unused]] size_t rows, bool prefetch,
                  float* y) const {
    const int8_t* w[kTogether];
    for (size_t c = 0; c < kTogether; ++c) w[c] = w_ + std::min(first + c, groups_ - 1) * quads_ * kLine;
    const bool more =
        prefetch && (first + kTogether) * quads_ * kLine + kTaskAheadBytes <= groups_ * quads_ * kLine;
    HWY_ALIGN float sums[kTogether * kRows];
#if SHADOWC_DIGITS || SHADOWC_PAIRS
    if (x.Exact()) {
      OfDigits(w, x, rows, more, sums);
    } else {
      OfFloats(w, x.x, more, sums);
    }
#else
    OfFloats(w, x.x, more, sums);
#endif
    const size_t begin = first * kRows, count = std::min(kTogether * kRows, outputs_ - begin);
    for (size_t o = 0; o < count; ++o) y[begin + o] = sums[o] * scales_[begin + o] + bias_[begin + o];
  }

#if SHADOWC_DIGITS
  HWY_INLINE void OfDigits(const int8_t* const* w, const DigitRow& x, size_t rows, bool more,
                           float* to) const {
    static_assert(hn::MaxLanes(hn::ScalableTag<int32_t>()) == kRows, "a vector is a line of 16 rows");
    if (kReadInOrder && rows == 1) {
      for (size_t c = 0; c < kTogether; ++c) OneInOrder(w[c], x, more, to + c * kRows);
      return;
    }
    const int8_t *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    DigitSums s0, s1, s2, s3;
    for (size_t q = 0; q < quads_; ++q) {
      if (more) {
        for (size_t c = 0; c < kTogether; ++c) PrefetchL2(w[c] + kTaskAheadBytes + q * kLine);
      }
      const Digits digits(x, 4 * q);
      digits.AddTo(LoadShifted(w0 + q * kLine), &s0), digits.AddTo(LoadShifted(w1 + q * kLine), &s1);
      digits.AddTo(LoadShifted(w2 + q * kLine), &s2), digits.AddTo(LoadShifted(w3 + q * kLine), &s3);
    }
    Store(s0, x, to), Store(s1, x, to + kRows), Store(s2, x, to + 2 * kRows), Store(s3, x, to + 3 * kRows);
  }

  // One group behind the other, as rows where kReadInOrder: each line is asked for three times, at three
  // distances. A call for the neurons of one layer takes 0.83 to 0.90 of its time with two threads, 0.75 to
  // 0.80 with one.
  HWY_INLINE void OneInOrder(const int8_t* w, const DigitRow& x, bool more, float* to) const {
    DigitSums even, odd;
    size_t q = 0;
    for (; q + 2 <= quads_; q += 2, w += 2 * kLine) {
      if (more) {
        for (const size_t ahead : {kTaskAheadBytes / 2, kTaskAheadBytes * 3 / 8, kTaskAheadBytes / 4}) {
          PrefetchL2(w + ahead), PrefetchL2(w + ahead + kLine);
        }
      }
      Digits(x, 4 * q).AddTo(LoadShifted(w), &even);
      Digits(x, 4 * q + 4).AddTo(LoadShifted(w + kLine), &odd);
    }
    if (q < quads_) Digits(x, 4 * q).AddTo(LoadShifted(w), &even);
    even.top = hn::Add(even.top, odd.top), even.upper = hn::Add(even.upper, odd.upper);
    even.all = hn::Add(even.all, odd.all);
    Store(even, x, to);
  }

  // Four values of x in every lane.
  struct Digits {
    hn::Vec<hn::ScalableTag<int8_t>> top, upper, all;

    HWY_INLINE Digits(const DigitRow& x, size_t i) {
      top = Four(x.digits + i), upper = Four(x.digits + x.stride + i),
      all = Four(x.digits + 2 * x.stride + i);
    }
    static HWY_INLINE hn::Vec<hn::ScalableTag<int8_t>> Four(const int8_t* p) {
      int32_t four;
      std::memcpy(&four, p, sizeof four);
      return hn::BitCast(hn::ScalableTag<int8_t>(), hn::Set(hn::ScalableTag<int32_t>(), four));
    }
    HWY_INLINE void AddTo(hn::Vec<hn::ScalableTag<uint8_t>> weights, DigitSums* to) const {
      const hn::ScalableTag<int32_t> d32;
      to->top = hn::SumOfMulQuadAccumulate(d32, weights, top, to->top);
      to->upper = hn::SumOfMulQuadAccumulate(d32, weights, upper, to->upper);
      to->all = hn::SumOfMulQuadAccumulate(d32, weights, all, to->all);
    }
  };

  static HWY_INLINE void Store(const DigitSums& s, const DigitRow& x, float* to) {
    const hn::ScalableTag<double> df64;
    const hn::Rebind<int32_t, decltype(df64)> half;
    const auto lower = [=](auto sums) HWY_ATTR { return hn::PromoteTo(df64, hn::LowerHalf(half, sums)); };
    const auto upper = [=](auto sums) HWY_ATTR { return hn::PromoteTo(df64, hn::UpperHalf(half, sums)); };
    StoreProducts(df64, x, lower(s.top), lower(s.upper), lower(s.all), to);
    StoreProducts(df64, x, upper(s.top), upper(s.upper), upper(s.all), to + kRows / 2);
  }
#elif SHADOWC_PAIRS
  using DWide = hn::CappedTag<int16_t, 16>;  // four rows' quads

  HWY_INLINE void OfDigits(const int8_t* const* w, const Activations<QuadWeight>& x, size_t, bool more,
                           float* to) const {
    for (size_t c = 0; c < kTogether; ++c) OneGroup(w[c], x, more, to + c * kRows);
  }

  HWY_INLINE void OneGroup(const int8_t* w, const Activations<QuadWeight>& x, bool more, float* to) const {
    using D32 = hn::Repartition<int32_t, DWide>;
    const DWide d16;
    const D32 d32;
    const hn::Rebind<int8_t, DWide> d8;
    auto a0 = hn::Zero(d32), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    const auto add = [=](const int8_t* four, auto upper, auto lower, auto& a, auto& b) HWY_ATTR {
      const auto weights = hn::PromoteTo(d16, hn::LoadU(d8, four));
      a = hn::Add(a, hn::WidenMulPairwiseAdd(d32, weights, upper));
      b = hn::Add(b, hn::WidenMulPairwiseAdd(d32, weights, lower));
    };
    for (size_t q = 0; q < quads_; ++q, w += kLine) {
      if (more) PrefetchL2(w + kTaskAheadBytes);
      const auto upper = Four(x.digits + 8 * q), lower = Four(x.digits + 8 * q + 4);
      add(w, upper, lower, a0, b0), add(w + 16, upper, lower, a1, b1);
      add(w + 32, upper, lower, a2, b2), add(w + 48, upper, lower, a3, b3);
    }
    Store(SumsOfPairs(a0, a1), SumsOfPairs(b0, b1), x.step, to);
    Store(SumsOfPairs(a2, a3), SumsOfPairs(b2, b3), x.step, to + kRows / 2);
  }

  // Four values in every four lanes.
  static HWY_INLINE hn::Vec<DWide> Four(const int16_t* p) {
    int64_t four;
    std::memcpy(&four, p, sizeof four);
    return hn::BitCast(DWide(), hn::Set(hn::Repartition<int64_t, DWide>(), four));
  }

  // Lane i: the sum of lanes 2i and 2i + 1 of both.
  template <class V>
  static HWY_INLINE V SumsOfPairs(V low, V high) {
    const hn::DFromV<V> d;
    return hn::Add(hn::ConcatEven(d, high, low), hn::ConcatOdd(d, high, low));
  }

  template <class V>
  static HWY_INLINE void Store(V upper, V lower, float step, float* to) {
    const hn::RebindToFloat<hn::DFromV<V>> df;
    constexpr float kBase = 1 << Activations<QuadWeight>::kDigitBits;
    const auto small = hn::Mul(hn::ConvertTo(df, lower), hn::Set(df, step));
    hn::StoreU(hn::MulAdd(hn::ConvertTo(df, upper), hn::Set(df, kBase * step), small), df, to);
  }
#endif

  using DLanes = hn::CappedTag<float, kRows>;

  // Lanes of 16 rows at a time, whatever a vector holds; of four groups, as a sum alone waits for itself.
  HWY_INLINE void OfFloats(const int8_t* const* w, const float* x, bool more, float* to) const {
    const DLanes df;
    for (size_t lane = 0; lane < kRows; lane += hn::Lanes(df)) {
      const int8_t *w0 = w[0] + 4 * lane, *w1 = w[1] + 4 * lane, *w2 = w[2] + 4 * lane, *w3 = w[3] + 4 * lane;
      auto s0 = hn::Zero(df), s1 = s0, s2 = s0, s3 = s0;
      for (size_t q = 0; q < quads_; ++q) {
        if (more && lane == 0) {
          for (size_t c = 0; c < kTogether; ++c) PrefetchL2(w[c] + kTaskAheadBytes + q * kLine);
        }
        s0 = WithQuad(w0 + q * kLine, x + 4 * q, s0), s1 = WithQuad(w1 + q * kLine, x + 4 * q, s1);
        s2 = WithQuad(w2 + q * kLine, x + 4 * q, s2), s3 = WithQuad(w3 + q * kLine, x + 4 * q, s3);
      }
      hn::StoreU(s0, df, to + lane), hn::StoreU(s1, df, to + kRows + lane);
      hn::StoreU(s2, df, to + 2 * kRows + lane), hn::StoreU(s3, df, to + 3 * kRows + lane);
    }
  }

  // Four weights of each lane's row times four values.
  static HWY_INLINE hn::Vec<DLanes> WithQuad(const int8_t* w, const float* x, hn::Vec<DLanes> sum) {
    const DLanes df;
    const hn::RebindToSigned<DLanes> di;
    const auto four = hn::BitCast(di, hn::LoadU(hn::Repartition<int8_t, DLanes>(), w));
    const auto weight = [=](auto shifted) HWY_ATTR { return hn::ConvertTo(df, hn::ShiftRight<24>(shifted)); };
    sum = hn::MulAdd(weight(hn::ShiftLeft<24>(four)), hn::Set(df, x[0]), sum);
    sum = hn::MulAdd(weight(hn::ShiftLeft<16>(four)), hn::Set(df, x[1]), sum);
    sum = hn::MulAdd(weight(hn::ShiftLeft<8>(four)), hn::Set(df, x[2]), sum);
    return hn::MulAdd(weight(four), hn::Set(df, x[3]), sum);
  }

  const int8_t* w_;
  const float *scales_, *bias_;
  size_t quads_, outputs_, groups_, together_;
};

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
