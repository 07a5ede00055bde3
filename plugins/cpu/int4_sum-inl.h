// SPDX-License-Identifier: Apache-2.0
// Int4 weight rows added to rows of y, once per SIMD target.
//
// With AVX-512, up to kInt4Rows rows are added together. The factors h * scale of one group of columns become
// integers X of some 21 bits, relative to the largest of them, in three digits (see digits-inl.h), or of 16
// in two. The bytes of four rows are woven into lanes of four pairs, one of each row, and multiplied with
// four digits at once: as they are, low + 16 * high, and their low halves alone; 16 times the sum of the high
// halves is the difference. All are exact integers: the result depends on which rows with factors other than
// zero share a call, not on where they stand in it. With AVX2 it is two rows and two digits of X of 24 bits
// (or of 16, in two).

#if defined(SHADOWC_CPU_INT4_SUM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_SUM_INL_H_
#undef SHADOWC_CPU_INT4_SUM_INL_H_
#else
#define SHADOWC_CPU_INT4_SUM_INL_H_
#endif

#include <algorithm>

#include "digits-inl.h"
#include "digits.h"
#include "int4-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// Rows of int4 that are added together; callers that want the same bits with some rows of zeros left out must
// leave the others where they are. On an Intel core 16 take less time than 8; on Zen 4 0.99 of it
// from L2, and 1.01 from memory.
inline constexpr size_t kInt4Rows = SHADOWC_DIGITS && HWY_TARGET != HWY_AVX3_ZEN4 ? 16 : 8;

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
  alignas(64) int32_t offset[kGroups];  // 8 * sum of X: weights are stored plus 8
  alignas(64) float step[kGroups];      // a factor is about step * X

  // Of groups g ... g + count, in so many digits. False if a factor has none: it is tiny, infinite or NaN.
  template <class Row>
  HWY_INLINE bool Split(Row row, size_t rows, const float* h, size_t g, size_t count, size_t places) {
    const float reach = places == 2 ? kMostTwoDigits : kMost;
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
    if (!hn::AllTrue(df, hn::Or(hn::Not(some), fits))) return false;
    hn::StoreU(hn::Mul(largest, hn::Set(df, 1.0f / reach)), df, step);
    Store(factors, hn::IfThenElseZero(some, hn::Div(hn::Set(df, reach), largest)));
    return true;
  }

 private:
#if SHADOWC_DIGITS
  // Four rows' digits change places with the three digits of each.
  HWY_INLINE void Store(const VF* factors, VF scale) {
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
        // None is out of range, which NearestInt would look for.
        const hn::Vec<decltype(di)> x{_mm512_cvtps_epi32(hn::Mul(factors[word * kInWord + k], scale).raw)};
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
    hn::StoreU(hn::ShiftLeft<3>(sum), di, offset);
  }
#else
  HWY_INLINE void Store(const VF* factors, VF scale) {
    const hn::RebindToSigned<DF> di;
    const auto half = hn::Set(di, 128), byte = hn::Set(di, 255);
    auto sum = hn::Zero(di);
    for (size_t word = 0; word < kInt4Rows / kInWord; ++word) {
      auto top = hn::Zero(di), upper = top, all = top;
      for (size_t k = kInWord; k-- > 0;) {
        const auto x = hn::NearestInt(hn::Mul(factors[word * kInWord + k], scale));
        const auto x1 = hn::ShiftRight<8>(hn::Add(x, half)), x2 = hn::ShiftRight<8>(hn::Add(x1, half));
        all = hn::Or(hn::ShiftLeft<8>(all), hn::And(x, byte));
        upper = hn::Or(hn::ShiftLeft<8>(upper), hn::And(x1, byte));
        top = hn::Or(hn::ShiftLeft<8>(top), hn::And(x2, byte));
        sum = hn::Add(sum, x);
      }
      const auto store = [&](auto digits, size_t digit) HWY_ATTR {
        hn::StoreU(hn::Or(digits, hn::ShiftLeft<16>(digits)), di,
                   reinterpret_cast<int32_t*>(words[word][digit]));
      };
      store(top, 0), store(upper, 1), store(all, 2);
    }
    hn::StoreU(hn::ShiftLeft<3>(sum), di, offset);
  }
#endif
};

#endif  // SHADOWC_DIGITS || SHADOWC_PAIRS

#if SHADOWC_DIGITS

// Which bytes of two rows' lines are woven: of every 16 columns of a group four at a time, so that, woven
// again, each lane of a vector holds the column after the one in front of it.
struct WeaveOrder {
  alignas(64) uint8_t of[2][64];
  constexpr WeaveOrder() : of() {
    for (size_t half = 0; half < 2; ++half) {
      for (size_t i = 0; i < 64; ++i) {
        const size_t block = i / 16, word = i % 16 / 2;
        const size_t column = 32 * half + word / 4 * 16 + block * 4 + word % 4;
        of[half][i] = static_cast<uint8_t>(column + i % 2 * 64);
      }
    }
  }
};
inline constexpr WeaveOrder kWeaveOrder;

// y [128] += the rows' groups g and g + 1, which are numbers j and j + 1 of `factors`; kFours: rows / 4,
// rounded up; kPlaces: their digits. fetch(c), for every c below 4 * kFours, is called between what is read.
template <size_t kFours, size_t kPlaces, class Row, class Fetch>
HWY_INLINE void AddPair(const GroupFactors& factors, size_t j, Row row, size_t count, size_t g,
                        float* HWY_RESTRICT y, Fetch fetch) {
  const DF df;
  const GroupBytes du8;
  const GroupInts d32;
  const hn::Repartition<uint16_t, GroupBytes> d16;
  const hn::Repartition<int8_t, GroupInts> d8;
  PairBytes lines[4 * kFours];
  HWY_UNROLL(16)
  for (size_t c = 0; c < 4 * kFours; ++c) {
    lines[c] = hn::LoadU(du8, &row(std::min(c, count - 1)).pairs[g * (kInt4Group / 2)].both);
  }
  const auto group = [&](size_t half) HWY_ATTR {
    const auto order = hn::SetTableIndices(du8, kWeaveOrder.of[half]);
    PairBytes woven[kFours][2];
    HWY_UNROLL(4)
    for (size_t f = 0; f < kFours; ++f) {
      const PairBytes* four = lines + 4 * f;
      const auto a = hn::BitCast(d16, hn::TwoTablesLookupLanes(du8, four[0], four[1], order));
      const auto b = hn::BitCast(d16, hn::TwoTablesLookupLanes(du8, four[2], four[3], order));
      woven[f][0] = hn::BitCast(du8, hn::InterleaveLower(d16, a, b));
      woven[f][1] = hn::BitCast(du8, hn::InterleaveUpper(d16, a, b));
      fetch(4 * f + 2 * half), fetch(4 * f + 2 * half + 1);
    }
    auto both0 = hn::Zero(d32), both1 = both0, low0 = both0, low1 = both0;
    HWY_UNROLL(3)
    for (size_t digit = 3 - kPlaces; digit < 3; ++digit) {
      if (digit != 3 - kPlaces) {
        both0 = hn::ShiftLeft<8>(both0), both1 = hn::ShiftLeft<8>(both1);
        low0 = hn::ShiftLeft<8>(low0), low1 = hn::ShiftLeft<8>(low1);
      }
      HWY_UNROLL(4)
      for (size_t f = 0; f < kFours; ++f) {
        const auto x = hn::BitCast(d8, hn::Set(d32, static_cast<int32_t>(factors.words[f][digit][j + half])));
        both0 = hn::SumOfMulQuadAccumulate(d32, woven[f][0], x, both0);
        low0 = hn::SumOfMulQuadAccumulate(d32, LowHalves(woven[f][0]), x, low0);
        both1 = hn::SumOfMulQuadAccumulate(d32, woven[f][1], x, both1);
        low1 = hn::SumOfMulQuadAccumulate(d32, LowHalves(woven[f][1]), x, low1);
      }
    }
    const auto offset = hn::Set(d32, factors.offset[j + half]), offset16 = hn::ShiftLeft<4>(offset);
    const VF step = hn::Set(df, factors.step[j + half]), step16 = hn::Mul(step, hn::Set(df, 1.0f / 16));
    float* to = y + half * kInt4Group;
    const auto add = [=](auto sums, VF scale, float* at) HWY_ATTR {
      hn::StoreU(hn::MulAdd(hn::ConvertTo(df, sums), scale, hn::LoadU(df, at)), df, at);
    };
    add(hn::Sub(low0, offset), step, to), add(hn::Sub(low1, offset), step, to + 16);
    add(hn::Sub(hn::Sub(both0, low0), offset16), step16, to + 32);
    add(hn::Sub(hn::Sub(both1, low1), offset16), step16, to + 48);
  };
  group(0), group(1);
}

// y [64] += the rows' group g, in floats: h * scale * value is looked up in a register that holds it for all
// 16 values.
template <class Row>
HWY_INLINE void LookUpGroup(Row row, size_t count, const float* h, size_t g, float* HWY_RESTRICT y) {
  const DF df;
  const hn::RebindToSigned<DF> d32;
  const hn::Rebind<uint8_t, DF> d8;
  const size_t lanes = hn::Lanes(df);
  const VF values = hn::ConvertTo(df, hn::Sub(hn::Iota(d32, 0), hn::Set(d32, 8)));
  VF a0 = hn::LoadU(df, y), a1 = hn::LoadU(df, y + lanes);
  VF a2 = hn::LoadU(df, y + 2 * lanes), a3 = hn::LoadU(df, y + 3 * lanes);
  for (size_t k = 0; k < count; ++k) {
    const Int4Pointer w = row(k);
    const uint8_t* pairs = &w.pairs[g * (kInt4Group / 2)].both;
    const VF table = hn::Mul(values, hn::Set(df, h[k] * w.scales[g]));
    // Only the lowest four bits of an index count.
    const auto first = hn::PromoteTo(d32, hn::LoadU(d8, pairs));
    const auto second = hn::PromoteTo(d32, hn::LoadU(d8, pairs + lanes));
    const auto look_up = [&](auto index) HWY_ATTR { return VF{_mm512_permutexvar_ps(index.raw, table.raw)}; };
    a0 = hn::Add(a0, look_up(first)), a1 = hn::Add(a1, look_up(second));
    a2 = hn::Add(a2, look_up(hn::ShiftRight<4>(first)));
    a3 = hn::Add(a3, look_up(hn::ShiftRight<4>(second)));
  }
  hn::StoreU(a0, df, y), hn::StoreU(a1, df, y + lanes);
  hn::StoreU(a2, df, y + 2 * lanes), hn::StoreU(a3, df, y + 3 * lanes);
}

// y [128] += the rows' groups g and g + 1, which are numbers j and j + 1 of `factors`.
template <size_t kPlaces, class Row, class Fetch>
HWY_INLINE void AddGroups(const GroupFactors& factors, size_t j, Row row, size_t count, size_t g,
                          float* HWY_RESTRICT y, Fetch fetch) {
  if (count <= 4) return AddPair<1, kPlaces>(factors, j, row, count, g, y, fetch);
  if (kInt4Rows == 8 || count <= 8) return AddPair<2, kPlaces>(factors, j, row, count, g, y, fetch);
  AddPair<kInt4Rows / 4, kPlaces>(factors, j, row, count, g, y, fetch);
}
inline constexpr size_t kGroupsAtOnce = 2;

#elif SHADOWC_PAIRS

// What up to eight rows add to 16 columns, for each digit: no more than 8 * 15 * 128, which int16 holds.
struct WordSums {
  using V = hn::Vec<hn::Repartition<int16_t, GroupBytes> >;
  V top, upper, all;
};

// y[0 ... 8) and y[16 ... 24) += (sums - offset) * step; lanes of `sums` are columns in that order.
template <size_t kPlaces>
HWY_INLINE void AddWords(const WordSums& sums, int32_t offset, float step, float* HWY_RESTRICT y) {
  const hn::Repartition<int16_t, GroupBytes> d16;
  const GroupInts d32;
  const hn::RebindToFloat<GroupInts> df;
  // all + 256 * upper, and 65536 * top.
  const auto places = hn::BitCast(d16, hn::Set(d32, (256 << 16) + 1));
  const auto join = [=](auto lower, auto top) HWY_ATTR {
    auto whole = hn::WidenMulPairwiseAdd(d32, lower, places);
    if constexpr (kPlaces == 3) whole = hn::Add(whole, hn::BitCast(d32, top));
    return hn::ConvertTo(df, hn::Sub(whole, hn::Set(d32, offset)));
  };
  const auto zero = hn::Zero(d16);
  const auto a =
      join(hn::InterleaveLower(d16, sums.all, sums.upper), hn::InterleaveLower(d16, zero, sums.top));
  const auto b =
      join(hn::InterleaveUpper(d16, sums.all, sums.upper), hn::InterleaveUpper(d16, zero, sums.top));
  const auto add = [=](auto value, float* to) HWY_ATTR {
    hn::StoreU(hn::MulAdd(value, hn::Set(df, step), hn::LoadU(df, to)), df, to);
  };
  add(hn::ConcatLowerLower(df, b, a), y), add(hn::ConcatUpperUpper(df, b, a), y + 16);
}

// y [64] += the rows' group g, which is number j of `factors`.
template <size_t kPlaces, class Row, class Fetch>
HWY_INLINE void AddGroups(const GroupFactors& factors, size_t j, Row row, size_t count, size_t g,
                          float* HWY_RESTRICT y, Fetch) {
  const GroupBytes d8;
  const hn::Repartition<int8_t, GroupBytes> di8;
  const hn::Repartition<int16_t, GroupBytes> d16;
  const hn::Repartition<uint16_t, GroupBytes> du16;
  const GroupInts d32;
  const auto mask = hn::Set(d8, 15);
  // Bytes of the lower halves of blocks of 16, then of the upper ones: two rows are woven at a time.
  HWY_UNROLL(2)
  for (size_t side = 0; side < 2; ++side) {
    const auto zero = hn::Zero(d16);
    WordSums low{zero, zero, zero}, high{zero, zero, zero};
    for (size_t k = 0; k < count; k += 2) {
      const auto load = [=](size_t r) HWY_ATTR {
        return hn::LoadU(d8, &row(std::min(r, count - 1)).pairs[g * (kInt4Group / 2)].both);
      };
      const auto first = load(k), second = load(k + 1);
      const auto woven =
          side == 0 ? hn::InterleaveLower(d8, first, second) : hn::InterleaveUpper(d8, first, second);
      const auto low_bytes = hn::And(woven, mask);
      const auto high_bytes = hn::And(hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(du16, woven))), mask);
      const auto add = [&](size_t digit, auto& of_low, auto& of_high) HWY_ATTR {
        const auto x = hn::BitCast(di8, hn::Set(d32, static_cast<int32_t>(factors.words[k / 2][digit][j])));
        of_low = hn::Add(of_low, hn::SatWidenMulPairwiseAdd(d16, low_bytes, x));
        of_high = hn::Add(of_high, hn::SatWidenMulPairwiseAdd(d16, high_bytes, x));
      };
      if constexpr (kPlaces == 3) add(0, low.top, high.top);
      add(1, low.upper, high.upper), add(2, low.all, high.all);
    }
    AddWords<kPlaces>(low, factors.offset[j], factors.step[j], y + side * 8);
    AddWords<kPlaces>(high, factors.offset[j], factors.step[j], y + side * 8 + kInt4Group / 2);
  }
}
inline constexpr size_t kGroupsAtOnce = 1;

// y [64] += the rows' group g, in floats.
template <class Row>
HWY_INLINE void LookUpGroup(Row row, size_t count, const float* h, size_t g, float* y) {
  const auto group = [=](size_t k) HWY_ATTR { return row(k) + g * kInt4Group; };
  AxpyTile<1>(&y, group, count, h, 0, kInt4Group, 0, group);
}

#endif  // SHADOWC_PAIRS

#if SHADOWC_DIGITS || SHADOWC_PAIRS

// As AxpyTile, for one row and at most kInt4Rows weight rows, with factors of kPlaces digits.
template <size_t kPlaces, class Row, class Later>
HWY_INLINE void AxpyGroups(float* HWY_RESTRICT y, Row row, size_t count, const float* h, size_t n,
                           size_t later_count, Later later) {
  const size_t groups = n / kInt4Group;
  GroupFactors factors;
  for (size_t first = 0; first < groups; first += GroupFactors::kGroups) {
    const size_t here = std::min(GroupFactors::kGroups, groups - first);
    const bool split = count != 0 && factors.Split(row, count, h, first, here, kPlaces);
    for (size_t j = 0; j < here; j += 2) {
      const size_t g = first + j;
      // Where as many rows follow as are read.
      const bool one_by_one = kPrefetchOneByOne && later_count == kInt4Rows && count + 4 > kInt4Rows;
      if (!one_by_one) PrefetchGroups(later, later_count, g, groups);
      const auto fetch = [=](size_t c) HWY_ATTR {
        if (one_by_one) PrefetchGroupsOf(later(c), c, g, groups);
      };
      const size_t end = std::min(here, j + 2);
      for (size_t i = j; i < end;) {
        const bool add = split && i + kGroupsAtOnce <= end;
        float* to = y + (first + i) * kInt4Group;
        if (add) AddGroups<kPlaces>(factors, i, row, count, first + i, to, fetch);
        if (!add) {
          for (size_t c = 0; c < kInt4Rows; ++c) fetch(c);
          LookUpGroup(row, count, h, first + i, to);
        }
        i += add ? kGroupsAtOnce : 1;
      }
    }
  }
}

template <size_t kRows, class Row, class Later>
HWY_INLINE void AxpyRows(float* const* y, Row row, size_t count, const float* h, size_t h_stride, size_t n,
                         Int4Digits digits, size_t later_count, Later later) {
  if constexpr (std::is_same_v<decltype(row(0)), Int4Pointer>) {
    for (size_t r = 0; r < kRows; ++r) {
      const float* factors = h + r * h_stride;
      const size_t fetched = r == 0 ? later_count : 0;
      if (digits == Int4Digits::kTwo) {
        AxpyGroups<2>(y[r], row, count, factors, n, fetched, later);
      } else {
        AxpyGroups<3>(y[r], row, count, factors, n, fetched, later);
      }
    }
  } else {
    if constexpr (kReadInOrder && kRows == 1 && std::is_same_v<decltype(row(0)), const int8_t*>) {
      const bool known = later_count != 0;
      if (count == 8 && (!known || later_count == count) && ReadsInOrder<int8_t>(n)) {
        const int8_t *rows[8], *next[8];
        for (size_t k = 0; k < count; ++k) rows[k] = row(k), next[k] = known ? later(k) : nullptr;
        return AddInOrder<Order::kByColumn, 8>(y[0], rows, h, n, known ? next : nullptr);
      }
    }
    AxpyTile<kRows>(y, row, count, h, h_stride, n, later_count, later);
  }
}

#else

template <size_t kRows, class Row, class Later>
HWY_INLINE void AxpyRows(float* const* y, Row row, size_t count, const float* h, size_t h_stride, size_t n,
                         Int4Digits, size_t later_count, Later later) {
  AxpyTile<kRows>(y, row, count, h, h_stride, n, later_count, later);
}

#endif  // SHADOWC_DIGITS || SHADOWC_PAIRS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
