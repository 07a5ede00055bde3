// SPDX-License-Identifier: Apache-2.0
// The factors with which int4 weight rows are added to y (int4_sum-inl.h), as digits. Once per SIMD target.

#if defined(SHADOWC_CPU_INT4_FACTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_FACTORS_INL_H_
#undef SHADOWC_CPU_INT4_FACTORS_INL_H_
#else
#define SHADOWC_CPU_INT4_FACTORS_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "digits-inl.h"
#include "digits.h"
#include "int4_fetch-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

#if SHADOWC_DIGITS || SHADOWC_PAIRS

// The factors of up to kInt4Rows rows for kGroups groups of columns.
struct GroupFactors {
  static constexpr size_t kGroups = hn::MaxLanes(DF());
#if SHADOWC_DIGITS
  static constexpr size_t kInWord = 4;
  // 16 times the largest sum of 8 * X fits an int32. Before 8 is taken from the weights sums may wrap.
  static constexpr float kMost = 0x7fffffff / (16 * 8 * kInt4Rows) - 1;
#else
  static constexpr size_t kInWord = 2;  // and again in the upper half
  static constexpr float kMost = kMostDigits;
#endif
  // Digits, most significant first, of kInWord rows in a word.
  alignas(64) uint32_t words[kInt4Rows / kInWord][3][kGroups];
  alignas(64) float step[kGroups];  // a factor is about step * X
#if SHADOWC_DIGITS
  alignas(64) float step16[kGroups];  // step / 16
  // Weights are stored plus 8: sums of low halves begin with -8 * sum of X, those of whole bytes with 17
  // times as much.
  alignas(64) int32_t low_start[kGroups], both_start[kGroups];
#else
  alignas(64) int32_t offset[kGroups];  // 8 * sum of X: weights are stored plus 8
#endif

  // Of groups g ... g + count, in kPlaces digits. Bit j: group g + j has them; not if a factor is tiny,
  // infinite or NaN.
  template <size_t kPlaces, class Row>
  HWY_INLINE uint32_t Split(Row row, size_t rows, const float* h, size_t g, size_t count) {
    constexpr float reach = kPlaces == 1 ? kMostOneDigit : kMost;
    const DF df;
    const hn::RebindToSigned<DF> di;
    VF factors[kInt4Rows];
    auto most = hn::Zero(di);
    for (size_t k = 0; k < rows; ++k) {
      factors[k] = hn::Mul(hn::Set(df, h[k]), hn::LoadN(df, row(k).scales + g, count));
      // Bits of non-negative floats are ordered as the floats are, infinities and NaN last.
      most = hn::Max(most, hn::BitCast(di, hn::Abs(factors[k])));
    }
    for (size_t k = rows; k < kInt4Rows; ++k) factors[k] = hn::Zero(df);
    const VF largest = hn::BitCast(df, most);
    const auto some = hn::RebindMask(df, hn::Gt(most, hn::Zero(di)));
    const auto fits = hn::And(hn::Gt(largest, hn::Set(df, kLeastWithDigits)),
                              hn::Lt(largest, hn::Set(df, kMostWithDigits)));
    const VF of_one = hn::Mul(largest, hn::Set(df, 1.0f / reach));
    hn::StoreU(of_one, df, step);
#if SHADOWC_DIGITS
    hn::StoreU(hn::Mul(of_one, hn::Set(df, 1.0f / 16)), df, step16);
#endif
    Store<kPlaces>(factors, hn::IfThenElseZero(some, hn::Div(hn::Set(df, reach), largest)));
    uint8_t bits[8] = {};
    hn::StoreMaskBits(df, hn::Or(hn::Not(some), fits), bits);
    return bits[0] | bits[1] << 8;
  }

 private:
#if SHADOWC_DIGITS
  // None is out of range, which NearestInt would look for.
  static HWY_INLINE hn::Vec<hn::RebindToSigned<DF>> Whole(VF factor, VF scale) {
    return hn::Vec<hn::RebindToSigned<DF>>{_mm512_cvtps_epi32(hn::Mul(factor, scale).raw)};
  }

  template <size_t kPlaces>
  HWY_INLINE void Store(const VF* factors, VF scale) {
    if constexpr (kPlaces == 1) return StoreRounded(factors, scale);
    StoreDigits(factors, scale);
  }

  HWY_INLINE void StoreStarts(hn::Vec<hn::RebindToSigned<DF>> sum) {
    const hn::RebindToSigned<DF> di;
    const auto start = hn::Neg(hn::ShiftLeft<3>(sum));
    hn::StoreU(start, di, low_start);
    hn::StoreU(hn::Add(start, hn::ShiftLeft<4>(start)), di, both_start);
  }

  // Bytes of four rows become words.
  HWY_INLINE void StoreRounded(const VF* factors, VF scale) {
    const hn::RebindToSigned<DF> di;
    const hn::Repartition<int16_t, DF> d16;
    const hn::Repartition<int8_t, DF> d8;
    alignas(16) static constexpr int8_t kByWord[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const auto by_word = hn::LoadDup128(d8, kByWord);
    auto sum = hn::Zero(di);
    for (size_t word = 0; word < kInt4Rows / kInWord; ++word) {
      const VF* four = factors + word * kInWord;
      const auto w0 = Whole(four[0], scale), w1 = Whole(four[1], scale);
      const auto w2 = Whole(four[2], scale), w3 = Whole(four[3], scale);
      const auto w01 = hn::ReorderDemote2To(d16, w0, w1), w23 = hn::ReorderDemote2To(d16, w2, w3);
      const auto bytes = hn::TableLookupBytes(hn::ReorderDemote2To(d8, w01, w23), by_word);
      hn::StoreU(bytes, d8, reinterpret_cast<int8_t*>(words[word][2]));
      sum = hn::Add(sum, hn::Add(hn::Add(w0, w1), hn::Add(w2, w3)));
    }
    StoreStarts(sum);
  }

  // Four rows' digits change places with the three digits of each.
  HWY_INLINE void StoreDigits(const VF* factors, VF scale) {
    const hn::RebindToSigned<DF> di;
    const hn::Repartition<uint8_t, DF> d8;
    const hn::Repartition<uint16_t, DF> d16;
    const hn::Repartition<uint32_t, DF> d32;
    const hn::Repartition<uint64_t, DF> d64;
    // Plus this, a number's bytes are its digits plus 128.
    const auto places = hn::Set(di, 0x808080);
    auto sum = hn::Zero(di);
    for (size_t word = 0; word < kInt4Rows / kInWord; ++word) {
      const auto digits = [&](size_t k) HWY_ATTR {
        const auto x = Whole(factors[word * kInWord + k], scale);
        sum = hn::Add(sum, x);
        return hn::BitCast(d8, hn::Xor(hn::Add(x, places), places));
      };
      const auto w0 = digits(0), w1 = digits(1), w2 = digits(2), w3 = digits(3);
      const auto a = hn::BitCast(d16, hn::InterleaveLower(d8, w0, w1)),
                 b = hn::BitCast(d16, hn::InterleaveUpper(d8, w0, w1));
      const auto c = hn::BitCast(d16, hn::InterleaveLower(d8, w2, w3)),
                 d = hn::BitCast(d16, hn::InterleaveUpper(d8, w2, w3));
      // Of one group in four: the words of the last digits, of the upper ones, of the top ones, and zeros.
      const auto g0 = hn::BitCast(d32, hn::InterleaveLower(d16, a, c)),
                 g1 = hn::BitCast(d32, hn::InterleaveUpper(d16, a, c));
      const auto g2 = hn::BitCast(d32, hn::InterleaveLower(d16, b, d)),
                 g3 = hn::BitCast(d32, hn::InterleaveUpper(d16, b, d));
      const auto lower01 = hn::BitCast(d64, hn::InterleaveLower(d32, g0, g1)),
                 lower23 = hn::BitCast(d64, hn::InterleaveLower(d32, g2, g3));
      const auto upper01 = hn::BitCast(d64, hn::InterleaveUpper(d32, g0, g1)),
                 upper23 = hn::BitCast(d64, hn::InterleaveUpper(d32, g2, g3));
      const auto store = [=](auto digits, uint32_t* to)
                             HWY_ATTR { hn::StoreU(hn::BitCast(d32, digits), d32, to); };
      store(hn::InterleaveLower(d64, upper01, upper23), words[word][0]);
      store(hn::InterleaveUpper(d64, lower01, lower23), words[word][1]);
      store(hn::InterleaveLower(d64, lower01, lower23), words[word][2]);
    }
    StoreStarts(sum);
  }
#else
  template <size_t kPlaces>
  HWY_INLINE void Store(const VF* factors, VF scale) {
    const hn::RebindToSigned<DF> di;
    const auto half = hn::Set(di, 128), byte = hn::Set(di, 255);
    auto sum = hn::Zero(di);
    for (size_t word = 0; word < kInt4Rows / kInWord; ++word) {
      auto top = hn::Zero(di), upper = top, all = top;
      for (size_t k = kInWord; k-- > 0;) {
        const auto x = hn::NearestInt(hn::Mul(factors[word * kInWord + k], scale));
        all = hn::Or(hn::ShiftLeft<8>(all), hn::And(x, byte));
        if constexpr (kPlaces == 3) {
          const auto x1 = hn::ShiftRight<8>(hn::Add(x, half)), x2 = hn::ShiftRight<8>(hn::Add(x1, half));
          upper = hn::Or(hn::ShiftLeft<8>(upper), hn::And(x1, byte));
          top = hn::Or(hn::ShiftLeft<8>(top), hn::And(x2, byte));
        }
        sum = hn::Add(sum, x);
      }
      const auto store = [&](auto digits, size_t digit) HWY_ATTR {
        hn::StoreU(hn::Or(digits, hn::ShiftLeft<16>(digits)), di,
                   reinterpret_cast<int32_t*>(words[word][digit]));
      };
      if constexpr (kPlaces == 3) store(top, 0), store(upper, 1);
      store(all, 2);
    }
    hn::StoreU(hn::ShiftLeft<3>(sum), di, offset);
  }
#endif
};

#endif  // SHADOWC_DIGITS || SHADOWC_PAIRS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
