// SPDX-License-Identifier: Apache-2.0
// Exact dot products of activations with int8 weights, once per SIMD target that has an 8-bit dot
// instruction; and the digits of a row, for int4 with AVX2 too.
//
// A row x becomes integers X = round(x / step) of 24 bits, written in three balanced digits of base 256, each
// in -128 ... 127: X = 65536 a + 256 b + c. A product with int8 weights is
// then three sums of 8-bit products, exact in int32, and independent of the order in which they are added.
// What is lost is the rounding of x to max|x| * 6e-8, no more than a float32 sum loses anywhere. Four weights
// and four digits are one lane of one instruction, where converting the weights to float takes three
// instructions for each lane of its own: at the bandwidth of one core that is the difference between waiting
// for memory and waiting for the conversion.

#if defined(SHADOWC_CPU_DIGITS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_DIGITS_INL_H_
#undef SHADOWC_CPU_DIGITS_INL_H_
#else
#define SHADOWC_CPU_DIGITS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "arena.h"
#include "digits.h"
#include "in_order-inl.h"
#include "parallel.h"
#include "rows-inl.h"
#include "types.h"

// HWY_AVX3_DL is the first x86 target with VNNI; better targets have lower numbers. Those from AVX2 on
// without it multiply bytes in pairs, into 16 bits: enough for int4 (int4_avx2-inl.h).
#undef SHADOWC_DIGITS
#undef SHADOWC_PAIRS
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
#define SHADOWC_DIGITS 1
#define SHADOWC_PAIRS 0
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
#define SHADOWC_DIGITS 0
#define SHADOWC_PAIRS 1
#else
#define SHADOWC_DIGITS 0
#define SHADOWC_PAIRS 0
#endif

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// One row of x, ready for products with weight rows of type W. In general that is x itself.
template <class W>
struct Activations {
  const float* x = nullptr;

  static size_t Bytes(size_t) { return 0; }
  void Prepare(const float* row, size_t, int8_t*, Int4Digits) { x = row; }
  bool Exact() const { return false; }  // products are sums of floats, grouped as DotTile does
};

// out[r * out_stride + c] = row r . w[c] for kRows rows and 4 weight rows; `later` as in DotTile.
template <size_t kRows, class W>
HWY_INLINE void DotRows(const Activations<W>* const* rows, const Pointer<W>* w, size_t n,
                        const Pointer<W>* later, float* out, size_t out_stride) {
  const float* x[kRows];
  for (size_t r = 0; r < kRows; ++r) x[r] = rows[r]->x;
  DotTile<kRows>(x, w[0], w[1], w[2], w[3], n, later, out, out_stride);
}

#if SHADOWC_DIGITS || SHADOWC_PAIRS

// Loaded once, not again by every instruction that reads it, as compilers do where registers are few: a core
// of Zen 4 loads 64 bytes in a cycle, and products took 1.4 of the time (from L1).
template <class V>
HWY_INLINE V InRegister(V v) {
  asm("" : "+v"(v.raw));
  return v;
}

// The largest magnitude of a row; not finite if a value is not.
HWY_INLINE float LargestOf(const float* x, size_t n) {
  const DF df;
  const hn::RebindToSigned<DF> di;
  const size_t lanes = hn::Lanes(df);
  // Bits of non-negative floats are ordered as the floats are, infinities and NaN last.
  auto most = hn::Zero(di);
  for (size_t i = 0; i < n; i += lanes) {
    most = hn::Max(most, hn::BitCast(di, hn::Abs(hn::LoadN(df, x + i, HWY_MIN(lanes, n - i)))));
  }
  return hn::GetLane(hn::BitCast(df, hn::MaxOfLanes(di, most)));
}

// The 8 bits of a group of x, which meets int4: digits of its first and of its second half, what x / digit
// is, and 8 * sum of x as rounded. What is lost is at most 0.031 of the group (root mean squares), some 0.006
// of normal values. x is finite.
HWY_INLINE void RoundGroup(const float* x, int8_t* first, int8_t* second, float* step, float* offset) {
  constexpr size_t kHalf = kInt4Group / 2;
  const DF df;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<int8_t, DF> d8;
  const float largest = LargestOf(x, kInt4Group);
  const bool some = largest > 1e-35f;  // steps below it are no normal numbers
  const VF scale = hn::Set(df, some ? kMostOneDigit / largest : 0.0f);
  auto sum = hn::Zero(di);
  for (size_t i = 0; i < kHalf; i += hn::Lanes(df)) {
    const auto round = [&](const float* from, int8_t* to) HWY_ATTR {
      const auto digits = hn::NearestInt(hn::Mul(hn::LoadU(df, from), scale));
      hn::StoreU(hn::DemoteTo(d8, digits), d8, to);
      sum = hn::Add(sum, digits);
    };
    round(x + i, first + i), round(x + kHalf + i, second + i);
  }
  *step = some ? largest / kMostOneDigit : 0.0f;
  *offset = 8.0f * static_cast<float>(hn::ReduceSum(di, sum)) * *step;
}

// A row as digits.
struct DigitRow {
  const float* x = nullptr;
  const int8_t* digits = nullptr;  // [3, stride], most significant first, zeros from n on
  size_t stride = 0;
  double step = 0.0;    // x is about step * X
  double offset = 0.0;  // 128 * sum of X, see Shifted

  static size_t Bytes(size_t n) { return 3 * hwy::RoundUpTo(n, hn::Lanes(hn::ScalableTag<int8_t>())); }
  // `memory` holds Bytes(n).
  void Prepare(const float* row, size_t n, int8_t* memory, Int4Digits = Int4Digits::kThree) {
    x = row;
    digits = memory;
    stride = Bytes(n) / 3;
    exact_ = n <= kMostInDigits && Split(n, memory);
  }
  bool Exact() const {
    return exact_;
  }  // false: x has no digits (it is too long, not finite, or tiny), floats are used

 protected:
  bool exact_ = false;

 private:
  bool Split(size_t n, int8_t* to) {
    const DF df;
    const hn::RebindToSigned<DF> di;
    const hn::RebindToUnsigned<DF> du;
    const hn::Rebind<uint8_t, DF> d8;
    const size_t lanes = hn::Lanes(df);
    const float largest = LargestOf(x, n);
    if (!HasDigits(largest)) return false;
    step = largest / kMostDigits;
    const VF scale = hn::Set(df, kMostDigits / largest);
    const auto half = hn::Set(di, 128);
    auto sum = hn::Zero(hn::RepartitionToWide<decltype(di)>());
    for (size_t i = 0; i < stride; i += lanes) {
      const size_t m = i < n ? HWY_MIN(lanes, n - i) : 0;
      const auto all = hn::NearestInt(hn::Mul(hn::LoadN(df, x + i, m), scale));
      const auto upper = hn::ShiftRight<8>(hn::Add(all, half));
      const auto top = hn::ShiftRight<8>(hn::Add(upper, half));
      const auto store = [&](auto digit, size_t place) HWY_ATTR {
        hn::StoreU(hn::TruncateTo(d8, hn::BitCast(du, digit)), d8,
                   reinterpret_cast<uint8_t*>(to) + place * stride + i);
      };
      store(top, 0), store(upper, 1), store(all, 2);
      sum = hn::Add(sum, hn::SumsOf2(all));
    }
    offset = 128.0 * static_cast<double>(hn::ReduceSum(hn::RepartitionToWide<decltype(di)>(), sum));
    return true;
  }
};

#endif  // SHADOWC_DIGITS || SHADOWC_PAIRS

#if SHADOWC_DIGITS

template <>
struct Activations<int8_t> : DigitRow {};

// The sums of a row's digits times one weight row.
struct DigitSums {
  using V = hn::Vec<hn::ScalableTag<int32_t>>;
  V top, upper, all;

  HWY_INLINE DigitSums() { top = upper = all = hn::Zero(hn::ScalableTag<int32_t>()); }

  HWY_INLINE void Add(hn::Vec<hn::ScalableTag<uint8_t>> weights, const int8_t* digits, size_t stride) {
    const hn::ScalableTag<int8_t> d8;
    const hn::ScalableTag<int32_t> d32;
    top = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits), top);
    upper = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits + stride), upper);
    all = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digits + 2 * stride), all);
  }
};

// The sums of four vectors, all at once, as Store4 of floats. Exact, whatever the order.
HWY_INLINE hn::Vec<hn::FixedTag<double, 4>> Sums4(DigitSums::V a, DigitSums::V b, DigitSums::V c,
                                                  DigitSums::V d) {
  const hn::ScalableTag<int32_t> d32;
  const hn::RepartitionToWide<decltype(d32)> pairs;
  const hn::FixedTag<int32_t, 4> four;
  const auto ab = hn::BitCast(pairs, hn::Add(hn::InterleaveLower(d32, a, b), hn::InterleaveUpper(d32, a, b)));
  const auto cd = hn::BitCast(pairs, hn::Add(hn::InterleaveLower(d32, c, d), hn::InterleaveUpper(d32, c, d)));
  const auto blocks = hn::Add(hn::BitCast(d32, hn::InterleaveLower(pairs, ab, cd)),
                              hn::BitCast(d32, hn::InterleaveUpper(pairs, ab, cd)));
  alignas(64) int32_t lanes[hn::MaxLanes(d32)];
  hn::Store(blocks, d32, lanes);
  auto sum = hn::Load(four, lanes);
  for (size_t i = 4; i < hn::Lanes(d32); i += 4) sum = hn::Add(sum, hn::Load(four, lanes + i));
  return hn::PromoteTo(hn::FixedTag<double, 4>(), sum);
}

// to[i] = the product of a row with weight row i, from the sums of its three digits.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void StoreProducts(D df64, const DigitRow& row, V top, V upper, V all, float* to) {
  const hn::Rebind<float, D> df32;
  // Whole numbers below 2^53: no order of these sums rounds.
  V sum = hn::MulAdd(hn::Set(df64, 256.0), upper, hn::Sub(all, hn::Set(df64, row.offset)));
  sum = hn::MulAdd(hn::Set(df64, 65536.0), top, sum);
  hn::StoreU(hn::DemoteTo(df32, hn::Mul(sum, hn::Set(df64, row.step))), df32, to);
}

// The same for four weight rows whose sums are spread over vectors.
HWY_INLINE void StoreProducts4(const DigitRow& row, const DigitSums& a, const DigitSums& b,
                               const DigitSums& c, const DigitSums& d, float* to) {
  StoreProducts(hn::FixedTag<double, 4>(), row, Sums4(a.top, b.top, c.top, d.top),
                Sums4(a.upper, b.upper, c.upper, d.upper), Sums4(a.all, b.all, c.all, d.all), to);
}

// The instruction takes unsigned by signed bytes: weights are shifted by 128, which adds 128 * sum(X) to a
// product.
HWY_INLINE hn::Vec<hn::ScalableTag<uint8_t>> Shifted(hn::Vec<hn::ScalableTag<int8_t>> weights) {
  const hn::ScalableTag<uint8_t> du8;
  return hn::Xor(hn::BitCast(du8, weights), hn::Set(du8, 0x80));
}
HWY_INLINE hn::Vec<hn::ScalableTag<uint8_t>> LoadShifted(const int8_t* w) {
  return Shifted(hn::LoadU(hn::ScalableTag<int8_t>(), w));
}

// One row with 4 weight rows, one behind the other (in_order-inl.h); `next`: the four that are read after
// them, null: they are not known.
template <Order kNextOrder>
HWY_INLINE void DotsInOrder(const DigitRow& row, const int8_t* const* w, size_t n, const int8_t* const* next,
                            float* out) {
  const size_t stride = row.stride;
  const int8_t* HWY_RESTRICT digits = row.digits;
  DigitSums sums[4];
  ForQuarters([&](auto quarter) HWY_ATTR {
    DigitSums sum;
    const int8_t* HWY_RESTRICT weights = w[quarter()];
    for (size_t i = 0; i < n; i += 4 * kLine) {
      FetchAhead<Order::kByRow, kNextOrder, 4, quarter(), 4>(w, next, n, i / 4);
      FetchAhead<Order::kByRow, kNextOrder, 4, quarter(), 3>(w, next, n, i / 4);
      FetchAhead<Order::kByRow, kNextOrder, 4, quarter(), 2>(w, next, n, i / 4);
      HWY_UNROLL(4)
      for (size_t line = 0; line < 4; ++line)
        sum.Add(LoadShifted(weights + i + line * kLine), digits + i + line * kLine, stride);
    }
    sums[quarter()] = sum;
  });
  StoreProducts4(row, sums[0], sums[1], sums[2], sums[3], out);
}

// kRows rows with 4 weight rows; `later` as in DotTile.
template <size_t kRows>
HWY_INLINE void DotDigitsTile(const Activations<int8_t>* const* rows, const int8_t* const* w, size_t n,
                              const int8_t* const* later, float* out, size_t out_stride) {
  static_assert(kRows == 1 || kRows == 2);
  const hn::ScalableTag<int8_t> d8;
  const size_t lanes = hn::Lanes(d8), stride = rows[0]->stride;
  const int8_t *HWY_RESTRICT x0 = rows[0]->digits, *HWY_RESTRICT x1 = rows[kRows - 1]->digits;
  const int8_t *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  DigitSums s00, s01, s02, s03, s10, s11, s12, s13;
  const auto step = [&](size_t i, const int8_t* const* ahead, auto load) HWY_ATTR {
    const auto column = [&](const int8_t* weights, size_t c, DigitSums& s0, DigitSums& s1) HWY_ATTR {
      if (ahead != nullptr) PrefetchL2(ahead[c] + i);
      const auto shifted = load(weights + i);
      s0.Add(shifted, x0 + i, stride);
      if constexpr (kRows == 2) s1.Add(shifted, x1 + i, stride);
    };
    column(w0, 0, s00, s10), column(w1, 1, s01, s11), column(w2, 2, s02, s12), column(w3, 3, s03, s13);
  };
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    if (!kPrefetchOneByOne && later != nullptr)
      PrefetchRows([=](size_t c) HWY_ATTR { return later[c]; }, 4, i, lanes, n);
    step(i, kPrefetchOneByOne ? later : nullptr, [](const int8_t* p) HWY_ATTR { return LoadShifted(p); });
  }
  if (i < n) step(i, nullptr, [&](const int8_t* p) HWY_ATTR { return Shifted(hn::LoadN(d8, p, n - i)); });
  StoreProducts4(*rows[0], s00, s01, s02, s03, out);
  if constexpr (kRows == 2) StoreProducts4(*rows[1], s10, s11, s12, s13, out + out_stride);
}

template <size_t kRows>
HWY_INLINE void DotRows(const Activations<int8_t>* const* rows, const int8_t* const* w, size_t n,
                        const int8_t* const* later, float* out, size_t out_stride) {
  if constexpr (kRows == 4) {
    DotRows<2>(rows, w, n, later, out, out_stride);
    DotRows<2>(rows + 2, w, n, nullptr, out + 2 * out_stride, out_stride);
  } else if constexpr (kRows == 2) {
    if (rows[0]->Exact() && rows[1]->Exact()) {
      DotDigitsTile<2>(rows, w, n, later, out, out_stride);
    } else {
      DotRows<1>(rows, w, n, later, out, out_stride);
      DotRows<1>(rows + 1, w, n, nullptr, out + out_stride, out_stride);
    }
  } else if (rows[0]->Exact()) {
    if constexpr (kReadInOrder) {
      if (ReadsInOrder<int8_t>(n)) return DotsInOrder<Order::kByRow>(*rows[0], w, n, later, out);
    }
    DotDigitsTile<1>(rows, w, n, later, out, out_stride);
  } else {
    DotTile<1>(&rows[0]->x, w[0], w[1], w[2], w[3], n, later, out, out_stride);
  }
}

#endif  // SHADOWC_DIGITS

// All rows of x [rows, n], prepared.
template <class W>
const Activations<W>* PrepareRows(const float* x, size_t rows, size_t n, Int4Digits digits, CallArena* arena,
                                  const Parallel& parallel) {
  auto* prepared = new (arena->Take<Activations<W>>(rows)) Activations<W>[rows];
  const size_t bytes = Activations<W>::Bytes(n);
  int8_t* memory = arena->Take<int8_t>(rows * bytes);
  parallel.For((rows + kTileRows - 1) / kTileRows, [&](size_t t) {
    for (size_t r = t * kTileRows; r < std::min(rows, (t + 1) * kTileRows); ++r)
      prepared[r].Prepare(x + r * n, n, memory + r * bytes, digits);
  });
  return prepared;
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
