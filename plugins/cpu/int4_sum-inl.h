// SPDX-License-Identifier: Apache-2.0
// Int4 weight rows added to rows of y, once per SIMD target.
//
// With AVX-512, up to kInt4Rows rows are added together. The factors h * scale of one group of columns become
// integers X of some 21 bits, relative to the largest of them, in three digits (see digits-inl.h). The bytes
// of four rows are woven into lanes of four pairs, one of each row, and multiplied with four digits at once:
// as they are, low + 16 * high, and their low halves alone; 16 times the sum of the high halves is the
// difference. All are exact integers: the result depends on which rows with factors other than zero share a
// call, not on where they stand in it. With AVX2 it is two rows and two digits of X of 24 bits.

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

  // Of groups g ... g + count. False if a factor has no digits: it is tiny, infinite or NaN.
  template <class Row>
  HWY_INLINE bool Split(Row row, size_t rows, const float* h, size_t g, size_t count) {
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
    hn::StoreU(hn::Mul(largest, hn::Set(df, 1.0f / kMost)), df, step);
    Store(factors, hn::IfThenElseZero(some, hn::Div(hn::Set(df, kMost), largest)));
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

// Four vectors of 16 lanes as the weaving leaves them: lanes 4b ... 4b + 3 of vector c are columns 16b + 4c
// ... of the 64. As columns: vector b holds columns 16b ... 16b + 15.
HWY_INLINE void Unweave(VF* v) {
  const auto a = _mm512_shuffle_f32x4(v[0].raw, v[1].raw, 0x44),
             b = _mm512_shuffle_f32x4(v[0].raw, v[1].raw, 0xee);
  const auto c = _mm512_shuffle_f32x4(v[2].raw, v[3].raw, 0x44),
             d = _mm512_shuffle_f32x4(v[2].raw, v[3].raw, 0xee);
  v[0] = VF{_mm512_shuffle_f32x4(a, c, 0x88)}, v[1] = VF{_mm512_shuffle_f32x4(a, c, 0xdd)};
  v[2] = VF{_mm512_shuffle_f32x4(b, d, 0x88)}, v[3] = VF{_mm512_shuffle_f32x4(b, d, 0xdd)};
}

// Rows first ... first + 3 of one pair of groups, the lower or upper halves of blocks of 16 pairs: lanes of
// four pairs, one of each row.
template <bool kUpper, class Row>
HWY_INLINE void WeaveFour(Row row, size_t first, size_t count, size_t g, PairBytes* to) {
  const GroupBytes d8;
  const hn::Repartition<uint16_t, GroupBytes> d16;
  const auto load = [=](size_t c) HWY_ATTR {
    return hn::LoadU(d8, &row(std::min(first + c, count - 1)).pairs[g * (kInt4Group / 2)].both);
  };
  const auto weave = [=](PairBytes a, PairBytes b) HWY_ATTR {
    return hn::BitCast(d16, kUpper ? hn::InterleaveUpper(d8, a, b) : hn::InterleaveLower(d8, a, b));
  };
  const auto a = weave(load(0), load(1)), b = weave(load(2), load(3));
  to[0] = hn::BitCast(d8, hn::InterleaveLower(d16, a, b));
  to[1] = hn::BitCast(d8, hn::InterleaveUpper(d16, a, b));
}

// y [128] += the rows' groups g and g + 1, which are numbers j and j + 1 of `factors`; kFours: rows / 4,
// rounded up. fetch(c), for every c below 4 * kFours, is called between what is read.
template <size_t kFours, class Row, class Fetch>
HWY_INLINE void AddPair(const GroupFactors& factors, size_t j, Row row, size_t count, size_t g,
                        float* HWY_RESTRICT y, Fetch fetch) {
  const DF df;
  const GroupInts d32;
  const hn::Repartition<int8_t, GroupInts> d8;
  const auto spread = [](const void* two) HWY_ATTR {
    return hn::BitCast(GroupInts(), SpreadPair(static_cast<const float*>(two)));
  };
  const auto offset = spread(factors.offset + j), offset16 = hn::ShiftLeft<4>(offset);
  VF low[4], high[4];
  // Columns 4c ... 4c + 7 of every 16 pairs.
  const auto half = [&](auto is_upper, size_t c) HWY_ATTR {
    PairBytes woven[kFours][2];
    HWY_UNROLL(4)
    for (size_t f = 0; f < kFours; ++f) {
      WeaveFour<is_upper()>(row, 4 * f, count, g, woven[f]);
      fetch(4 * f + 2 * is_upper()), fetch(4 * f + 2 * is_upper() + 1);
    }
    auto both0 = hn::Zero(d32), both1 = both0, low0 = both0, low1 = both0;
    HWY_UNROLL(3)
    for (size_t digit = 0; digit < 3; ++digit) {
      if (digit != 0) {
        both0 = hn::ShiftLeft<8>(both0), both1 = hn::ShiftLeft<8>(both1);
        low0 = hn::ShiftLeft<8>(low0), low1 = hn::ShiftLeft<8>(low1);
      }
      HWY_UNROLL(4)
      for (size_t f = 0; f < kFours; ++f) {
        const auto x = hn::BitCast(d8, spread(factors.words[f][digit] + j));
        both0 = hn::SumOfMulQuadAccumulate(d32, woven[f][0], x, both0);
        low0 = hn::SumOfMulQuadAccumulate(d32, LowHalves(woven[f][0]), x, low0);
        both1 = hn::SumOfMulQuadAccumulate(d32, woven[f][1], x, both1);
        low1 = hn::SumOfMulQuadAccumulate(d32, LowHalves(woven[f][1]), x, low1);
      }
    }
    high[c] = hn::ConvertTo(df, hn::Sub(hn::Sub(both0, low0), offset16));
    high[c + 1] = hn::ConvertTo(df, hn::Sub(hn::Sub(both1, low1), offset16));
    low[c] = hn::ConvertTo(df, hn::Sub(low0, offset));
    low[c + 1] = hn::ConvertTo(df, hn::Sub(low1, offset));
  };
  half(std::false_type(), 0), half(std::true_type(), 2);
  Unweave(low), Unweave(high);
  const VF step0 = hn::Set(df, factors.step[j]), step1 = hn::Set(df, factors.step[j + 1]);
  const auto add = [=](const VF* values, VF first, VF second, float* to) HWY_ATTR {
    const auto one = [](VF value, VF step, float* at)
                         HWY_ATTR { hn::StoreU(hn::MulAdd(value, step, hn::LoadU(DF(), at)), DF(), at); };
    one(values[0], first, to), one(values[1], first, to + 16);
    one(values[2], second, to + kInt4Group), one(values[3], second, to + kInt4Group + 16);
  };
  const VF sixteenth = hn::Set(df, 1.0f / 16);
  add(low, step0, step1, y);
  add(high, hn::Mul(step0, sixteenth), hn::Mul(step1, sixteenth), y + kInt4Group / 2);
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
template <class Row, class Fetch>
HWY_INLINE void AddGroups(const GroupFactors& factors, size_t j, Row row, size_t count, size_t g,
                          float* HWY_RESTRICT y, Fetch fetch) {
  if (count <= 4) return AddPair<1>(factors, j, row, count, g, y, fetch);
  if (kInt4Rows == 8 || count <= 8) return AddPair<2>(factors, j, row, count, g, y, fetch);
  AddPair<kInt4Rows / 4>(factors, j, row, count, g, y, fetch);
}
inline constexpr size_t kGroupsAtOnce = 2;

#elif SHADOWC_PAIRS

// What up to eight rows add to 16 columns, for each digit: no more than 8 * 15 * 128, which int16 holds.
struct WordSums {
  using V = hn::Vec<hn::Repartition<int16_t, GroupBytes> >;
  V top, upper, all;
};

// y[0 ... 8) and y[16 ... 24) += (sums - offset) * step; lanes of `sums` are columns in that order.
HWY_INLINE void AddWords(const WordSums& sums, int32_t offset, float step, float* HWY_RESTRICT y) {
  const hn::Repartition<int16_t, GroupBytes> d16;
  const GroupInts d32;
  const hn::RebindToFloat<GroupInts> df;
  // all + 256 * upper, and 65536 * top.
  const auto places = hn::BitCast(d16, hn::Set(d32, (256 << 16) + 1));
  const auto join = [=](auto lower, auto top) HWY_ATTR {
    const auto whole = hn::Add(hn::WidenMulPairwiseAdd(d32, lower, places), hn::BitCast(d32, top));
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
template <class Row, class Fetch>
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
      add(0, low.top, high.top), add(1, low.upper, high.upper), add(2, low.all, high.all);
    }
    AddWords(low, factors.offset[j], factors.step[j], y + side * 8);
    AddWords(high, factors.offset[j], factors.step[j], y + side * 8 + kInt4Group / 2);
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

// As AxpyTile, for one row and at most kInt4Rows weight rows.
template <class Row, class Later>
HWY_INLINE void AxpyGroups(float* HWY_RESTRICT y, Row row, size_t count, const float* h, size_t n,
                           size_t later_count, Later later) {
  const size_t groups = n / kInt4Group;
  GroupFactors factors;
  for (size_t first = 0; first < groups; first += GroupFactors::kGroups) {
    const size_t here = std::min(GroupFactors::kGroups, groups - first);
    const bool split = count != 0 && factors.Split(row, count, h, first, here);
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
        if (add) AddGroups(factors, i, row, count, first + i, to, fetch);
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
                         size_t later_count, Later later) {
  if constexpr (std::is_same_v<decltype(row(0)), Int4Pointer>) {
    for (size_t r = 0; r < kRows; ++r)
      AxpyGroups(y[r], row, count, h + r * h_stride, n, r == 0 ? later_count : 0, later);
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
                         size_t later_count, Later later) {
  AxpyTile<kRows>(y, row, count, h, h_stride, n, later_count, later);
}

#endif  // SHADOWC_DIGITS || SHADOWC_PAIRS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
