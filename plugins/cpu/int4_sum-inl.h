// SPDX-License-Identifier: Apache-2.0
// Int4 weight rows added to rows of y, once per SIMD target.
//
// With AVX-512, up to kInt4Rows rows are added together. The factors h * scale of one group of columns become
// integers X of some 21 bits, relative to the largest of them, in three digits (int4_factors-inl.h), or of 8
// in one. The bytes of four rows are woven into lanes of four pairs, one of each row, and multiplied with
// four digits at once: as they are, low + 16 * high, and their low halves alone; 16 times the sum of the high
// halves is the difference. All are exact integers: the result depends on which rows with factors other than
// zero share a call, not on where they stand in it. With AVX2 it is two rows and two digits of X of 24 bits
// (or of 8).

#if defined(SHADOWC_CPU_INT4_SUM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_SUM_INL_H_
#undef SHADOWC_CPU_INT4_SUM_INL_H_
#else
#define SHADOWC_CPU_INT4_SUM_INL_H_
#endif

#include <algorithm>

#include "digits-inl.h"
#include "int4-inl.h"
#include "int4_factors-inl.h"
#include "int4_fetch-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

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
    const auto low_start = hn::Set(d32, factors.low_start[j + half]);
    const auto both_start = hn::Set(d32, factors.both_start[j + half]);
    auto both0 = hn::Zero(d32), both1 = both0, low0 = both0, low1 = both0;
    HWY_UNROLL(3)
    for (size_t digit = 3 - kPlaces; digit < 3; ++digit) {
      if (digit != 3 - kPlaces) {
        both0 = hn::ShiftLeft<8>(both0), both1 = hn::ShiftLeft<8>(both1);
        low0 = hn::ShiftLeft<8>(low0), low1 = hn::ShiftLeft<8>(low1);
      }
      if (digit == 2) {
        both0 = hn::Add(both0, both_start), both1 = hn::Add(both1, both_start);
        low0 = hn::Add(low0, low_start), low1 = hn::Add(low1, low_start);
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
    const VF step = hn::Set(df, factors.step[j + half]), step16 = hn::Set(df, factors.step16[j + half]);
    float* to = y + half * kInt4Group;
    const auto add = [=](auto sums, VF scale, float* at) HWY_ATTR {
      hn::StoreU(hn::MulAdd(hn::ConvertTo(df, sums), scale, hn::LoadU(df, at)), df, at);
    };
    add(low0, step, to), add(low1, step, to + 16);
    add(hn::Sub(both0, low0), step16, to + 32), add(hn::Sub(both1, low1), step16, to + 48);
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

// y [64] += the rows' group g, which is number j of `factors`, of one digit: sums less the offset fit 16
// bits.
template <class Row>
HWY_INLINE void AddRounded(const GroupFactors& factors, size_t j, Row row, size_t count, size_t g,
                           float* HWY_RESTRICT y) {
  static_assert(kInt4Rows * (15 + 8) * 128 < 1 << 15);
  const GroupBytes d8;
  const hn::Repartition<int8_t, GroupBytes> di8;
  const hn::Repartition<int16_t, GroupBytes> d16;
  const GroupInts d32;
  const GroupFloats df;
  const auto start = hn::Set(d16, static_cast<int16_t>(-factors.offset[j]));
  // Of the lower and of the upper halves of blocks of 16 bytes.
  auto low0 = start, high0 = start, low1 = start, high1 = start;
  for (size_t k = 0; k < count; k += 2) {
    const auto first = InRegister(LoadGroup(row(k), g));
    const auto second = InRegister(LoadGroup(row(std::min(k + 1, count - 1)), g));
    const auto x = hn::BitCast(di8, hn::Set(d32, static_cast<int32_t>(factors.words[k / 2][2][j])));
    const auto add = [=](auto woven, auto& low, auto& high) HWY_ATTR {
      low = hn::Add(low, hn::SatWidenMulPairwiseAdd(d16, LowHalves(woven), x));
      high = hn::Add(high, hn::SatWidenMulPairwiseAdd(d16, HighHalves(woven), x));
    };
    add(hn::InterleaveLower(d8, first, second), low0, high0);
    add(hn::InterleaveUpper(d8, first, second), low1, high1);
  }
  const auto step = hn::Set(df, factors.step[j]);
  const auto add = [=](auto whole, float* to) HWY_ATTR {
    hn::StoreU(hn::MulAdd(hn::ConvertTo(df, whole), step, hn::LoadU(df, to)), df, to);
  };
  const auto eight = [=](auto sums, float* to) HWY_ATTR {
    add(hn::PromoteLowerTo(d32, sums), to), add(hn::PromoteUpperTo(d32, sums), to + 16);
  };
  eight(low0, y), eight(low1, y + 8);
  eight(high0, y + kInt4Group / 2), eight(high1, y + kInt4Group / 2 + 8);
}

// y [64] += the rows' group g, which is number j of `factors`.
template <size_t kPlaces, class Row, class Fetch>
HWY_INLINE void AddGroups(const GroupFactors& factors, size_t j, Row row, size_t count, size_t g,
                          float* HWY_RESTRICT y, Fetch) {
  if constexpr (kPlaces == 1) return AddRounded(factors, j, row, count, g, y);
  const GroupBytes d8;
  const hn::Repartition<int8_t, GroupBytes> di8;
  const hn::Repartition<int16_t, GroupBytes> d16;
  const GroupInts d32;
  // Bytes of the lower halves of blocks of 16, then of the upper ones: two rows are woven at a time.
  HWY_UNROLL(2)
  for (size_t side = 0; side < 2; ++side) {
    const auto zero = hn::Zero(d16);
    WordSums low{zero, zero, zero}, high{zero, zero, zero};
    for (size_t k = 0; k < count; k += 2) {
      const auto first = LoadGroup(row(k), g), second = LoadGroup(row(std::min(k + 1, count - 1)), g);
      const auto woven =
          side == 0 ? hn::InterleaveLower(d8, first, second) : hn::InterleaveUpper(d8, first, second);
      const auto low_bytes = LowHalves(woven), high_bytes = HighHalves(woven);
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

// As AxpyTile, for one row and at most kInt4Rows weight rows, with factors of kPlaces digits; of pairs of
// groups that have none, in floats. fetch.At(g), and what it gives with every c below kInt4Rows, is called
// while groups g and g + 1 are read.
template <size_t kPlaces, class Row, class Fetch>
HWY_INLINE void AxpyDigits(float* HWY_RESTRICT y, Row row, size_t count, const float* h, size_t n,
                           Fetch fetch) {
  const size_t groups = n / kInt4Group;
  GroupFactors factors;
  for (size_t first = 0; first < groups; first += GroupFactors::kGroups) {
    const size_t here = std::min(GroupFactors::kGroups, groups - first);
    const uint32_t split = count == 0 ? 0 : factors.Split<kPlaces>(row, count, h, first, here);
    for (size_t j = 0; j < here; j += 2) {
      const size_t end = std::min(here, j + 2);
      const auto step = fetch.At(first + j);
      constexpr uint32_t kAtOnce = (1 << kGroupsAtOnce) - 1;
      const bool within = kGroupsAtOnce == 2 && j + 2 == end && (split >> j & kAtOnce) == kAtOnce;
      for (size_t c = 0; !within && c < kInt4Rows; ++c) step(c);  // otherwise between what is read
      for (size_t i = j; i < end;) {
        const bool add = i + kGroupsAtOnce <= end && (split >> i & kAtOnce) == kAtOnce;
        float* to = y + (first + i) * kInt4Group;
        if (add) {
          AddGroups<kPlaces>(factors, i, row, count, first + i, to, step);
        } else {
          LookUpGroup(row, count, h, first + i, to);
        }
        i += add ? kGroupsAtOnce : 1;
      }
    }
  }
}

template <size_t kPlaces, class Row, class Later>
HWY_INLINE void AxpyGroups(float* HWY_RESTRICT y, Row row, size_t count, const float* h, size_t n,
                           size_t later_count, Later later) {
  AxpyDigits<kPlaces>(y, row, count, h, n, RowsFetch<Later>(later, later_count, count, n / kInt4Group));
}

template <size_t kRows, class Row, class Later>
HWY_INLINE void AxpyRows(float* const* y, Row row, size_t count, const float* h, size_t h_stride, size_t n,
                         Int4Digits digits, size_t later_count, Later later) {
  if constexpr (std::is_same_v<decltype(row(0)), Int4Pointer>) {
    for (size_t r = 0; r < kRows; ++r) {
      const float* factors = h + r * h_stride;
      const size_t fetched = r == 0 ? later_count : 0;
      if (digits == Int4Digits::kOne) {
        AxpyGroups<1>(y[r], row, count, factors, n, fetched, later);
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
