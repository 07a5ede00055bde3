// SPDX-License-Identifier: Apache-2.0
// Exact dot products of activations with int8 weights, once per SIMD target that has an 8-bit dot
// instruction.
//
// A row x becomes integers X = round(x / step) of 24 bits, written in three balanced digits of base 256, each
// in -128 ... 127: X = 65536 a + 256 b + c. A product with int8 weights is then three sums of 8-bit products,
// exact in int32, and independent of the order in which they are added. What is lost is the rounding of x to
// max|x| * 6e-8, no more than a float32 sum loses anywhere. Four weights and four digits are one lane of one
// instruction, where converting the weights to float takes three instructions for each lane of its own: at
// the bandwidth of one core that is the difference between waiting for memory and waiting for the conversion.

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
#include "parallel.h"
#include "rows-inl.h"
#include "types.h"

// HWY_AVX3_DL is the first x86 target with VNNI; better targets have lower numbers.
#undef SHADOWC_DIGITS
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
#define SHADOWC_DIGITS 1
#else
#define SHADOWC_DIGITS 0
#endif

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// One row of x, ready for products with weight rows of type W. In general that is x itself.
template <class W>
struct Activations {
  static constexpr bool kDigits = false;
  const float* x = nullptr;

  static size_t Bytes(size_t) { return 0; }
  void Prepare(const float* row, size_t, int8_t*) { x = row; }
  bool Exact() const { return false; }  // products are sums of floats, grouped as DotTile does
};

// out[r * out_stride + c] = row r . w[c] for kRows rows and kWeights weight rows; `later` as in DotTile.
template <size_t kRows, size_t kWeights, class W>
HWY_INLINE void DotRows(const Activations<W>* const* rows, const W* const* w, size_t n, const W* const* later,
                        float* out, size_t out_stride) {
  static_assert(kWeights == 4);
  const float* x[kRows];
  for (size_t r = 0; r < kRows; ++r) x[r] = rows[r]->x;
  DotTile<kRows>(x, w[0], w[1], w[2], w[3], n, later, out, out_stride);
}

#if SHADOWC_DIGITS

template <>
struct Activations<int8_t> {
  static constexpr bool kDigits = true;
  const float* x = nullptr;
  const int8_t* digits = nullptr;  // [3, stride], most significant first, zeros from n on
  size_t stride = 0;
  double step = 0.0;    // x is about step * X
  double offset = 0.0;  // 128 * sum of X, see DotDigits

  static size_t Bytes(size_t n) { return 3 * hwy::RoundUpTo(n, hn::Lanes(hn::ScalableTag<int8_t>())); }
  // `memory` holds Bytes(n).
  void Prepare(const float* row, size_t n, int8_t* memory) {
    x = row;
    digits = memory;
    stride = Bytes(n) / 3;
    exact_ = Split(n, memory);
  }
  bool Exact() const {
    return exact_;
  }  // false: x has no digits (it is not finite, or tiny), floats are used

 private:
  bool exact_ = false;
  bool Split(size_t n, int8_t* to) {
    // Three digits reach 127 * 65793 = 8355711; a little less, for the rounding of x * scale.
    constexpr float kMost = 8355000.0f;
    const DF df;
    const hn::RebindToSigned<DF> di;
    const hn::RebindToUnsigned<DF> du;
    const hn::Rebind<uint8_t, DF> d8;
    const size_t lanes = hn::Lanes(df);
    // Bits of non-negative floats are ordered as the floats are, infinities and NaN last.
    auto most = hn::Zero(di);
    for (size_t i = 0; i < n; i += lanes) {
      most = hn::Max(most, hn::BitCast(di, hn::Abs(hn::LoadN(df, x + i, HWY_MIN(lanes, n - i)))));
    }
    const float largest = hn::GetLane(hn::BitCast(df, hn::MaxOfLanes(di, most)));
    if (!(largest > 1e-30f && largest < 1e30f)) return false;
    step = largest / kMost;
    const VF scale = hn::Set(df, kMost / largest);
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

// Products of kRows rows with kWeights weight rows (1 or 4). The instruction takes unsigned by signed bytes:
// the weights are shifted by 128, which adds 128 * sum(X) to every product.
template <size_t kRows, size_t kWeights>
HWY_INLINE void DotDigits(const Activations<int8_t>* const* rows, const int8_t* const* w, size_t n,
                          const int8_t* const* later, float* out, size_t out_stride) {
  static_assert((kRows == 1 || kRows == 2) && (kWeights == 1 || kWeights == 4));
  const hn::ScalableTag<int8_t> d8;
  const hn::ScalableTag<uint8_t> du8;
  const hn::ScalableTag<int32_t> d32;
  const size_t lanes = hn::Lanes(d8);
  const auto sign = hn::Set(du8, 0x80);
  using V = hn::Vec<decltype(d32)>;
  struct Sums {
    V top, upper, all;
  };
  const V zero = hn::Zero(d32);
  Sums s00{zero, zero, zero}, s01 = s00, s02 = s00, s03 = s00, s10 = s00, s11 = s00, s12 = s00, s13 = s00;
  const auto add = [&](Sums& s, hn::Vec<decltype(du8)> weights, const Activations<int8_t>& row,
                       size_t i) HWY_ATTR {
    const int8_t* digit = row.digits + i;
    s.top = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digit), s.top);
    s.upper = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digit + row.stride), s.upper);
    s.all = hn::SumOfMulQuadAccumulate(d32, weights, hn::LoadU(d8, digit + 2 * row.stride), s.all);
  };
  const auto step = [&](size_t i, auto load) HWY_ATTR {
    const auto column = [&](size_t c, Sums& s0, Sums& s1) HWY_ATTR {
      const auto weights = hn::Xor(hn::BitCast(du8, load(w[c] + i)), sign);
      add(s0, weights, *rows[0], i);
      if constexpr (kRows == 2) add(s1, weights, *rows[1], i);
    };
    column(0, s00, s10);
    if constexpr (kWeights == 4) column(1, s01, s11), column(2, s02, s12), column(3, s03, s13);
  };
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    if (later != nullptr) {
      for (size_t c = 0; c < kWeights; ++c) PrefetchStep(later[c] + i, lanes);
    }
    step(i, [&](const int8_t* p) HWY_ATTR { return hn::LoadU(d8, p); });
  }
  if (i < n) step(i, [&](const int8_t* p) HWY_ATTR { return hn::LoadN(d8, p, n - i); });
  const auto store = [&](const Sums& s, size_t r, size_t c) HWY_ATTR {
    const double sum = 65536.0 * hn::ReduceSum(d32, s.top) + 256.0 * hn::ReduceSum(d32, s.upper) +
                       static_cast<double>(hn::ReduceSum(d32, s.all)) - rows[r]->offset;
    out[r * out_stride + c] = static_cast<float>(sum * rows[r]->step);
  };
  store(s00, 0, 0);
  if constexpr (kWeights == 4) store(s01, 0, 1), store(s02, 0, 2), store(s03, 0, 3);
  if constexpr (kRows == 2) {
    store(s10, 1, 0);
    if constexpr (kWeights == 4) store(s11, 1, 1), store(s12, 1, 2), store(s13, 1, 3);
  }
}

template <size_t kRows, size_t kWeights>
HWY_INLINE void DotRows(const Activations<int8_t>* const* rows, const int8_t* const* w, size_t n,
                        const int8_t* const* later, float* out, size_t out_stride) {
  if constexpr (kRows == 4) {
    DotRows<2, kWeights>(rows, w, n, later, out, out_stride);
    DotRows<2, kWeights>(rows + 2, w, n, nullptr, out + 2 * out_stride, out_stride);
  } else if constexpr (kRows == 2) {
    if (rows[0]->Exact() && rows[1]->Exact()) {
      DotDigits<2, kWeights>(rows, w, n, later, out, out_stride);
    } else {
      DotRows<1, kWeights>(rows, w, n, later, out, out_stride);
      DotRows<1, kWeights>(rows + 1, w, n, nullptr, out + out_stride, out_stride);
    }
  } else if constexpr (kWeights == 1) {
    DotDigits<1, 1>(rows, w, n, later, out, out_stride);
  } else if (rows[0]->Exact()) {
    DotDigits<1, 4>(rows, w, n, later, out, out_stride);
  } else {
    DotTile<1>(&rows[0]->x, w[0], w[1], w[2], w[3], n, later, out, out_stride);
  }
}

#endif  // SHADOWC_DIGITS

// All rows of x [rows, n], prepared.
template <class W>
const Activations<W>* PrepareRows(const float* x, size_t rows, size_t n, CallArena* arena,
                                  const Parallel& parallel) {
  auto* prepared = new (arena->Take<Activations<W>>(rows)) Activations<W>[rows];
  const size_t bytes = Activations<W>::Bytes(n);
  int8_t* memory = arena->Take<int8_t>(rows * bytes);
  parallel.For((rows + kTileRows - 1) / kTileRows, [&](size_t t) {
    for (size_t r = t * kTileRows; r < std::min(rows, (t + 1) * kTileRows); ++r)
      prepared[r].Prepare(x + r * n, n, memory + r * bytes);
  });
  return prepared;
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
