// SPDX-License-Identifier: Apache-2.0
// Whole records of int4 neurons, read in an order in which every line can be fetched three times, at three
// distances (see in_order-inl.h). Once per SIMD target.
//
// Eight neurons are a batch of four quarters: the first halves of four, of the other four, and the two halves
// of the columns of all eight second halves.

#if defined(SHADOWC_CPU_INT4_IN_ORDER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_IN_ORDER_INL_H_
#undef SHADOWC_CPU_INT4_IN_ORDER_INL_H_
#else
#define SHADOWC_CPU_INT4_IN_ORDER_INL_H_
#endif

#include <algorithm>

#include "digits-inl.h"
#include "in_order-inl.h"
#include "int4-inl.h"
#include "int4_sum-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

#if SHADOWC_DIGITS

// A batch of neurons.
struct EightRecords {
  Int4Pointer first[8], second[8];
};

static_assert(!kReadInOrder || kInt4Rows == 8);

HWY_INLINE void FetchScales(const Int4Pointer* rows, size_t row, size_t line) {
  PrefetchL2(rows[row].scales + line * (kLine / sizeof(float)));
}

// What is fetched while a line of each of some rows is read: lines of three parts of a batch, a part's `at`
// bytes from where its rows begin. A quarter of columns lasts half as many steps as one of rows and has twice
// the rows, so one of its steps fetches two lines of each of the latter's: those of `upper`.
struct FetchStep3 {
  struct Lines {
    const Int4Pointer *rows, *upper;  // upper: for row 4 and those behind it
    size_t at, upper_at;
    HWY_INLINE void Fetch(size_t c) const {
      PrefetchL2(c < 4 ? &rows[c].pairs->both + at : &upper[c - 4].pairs->both + upper_at);
    }
  } whole, three, two;  // a whole batch later, three and two quarters

  HWY_INLINE void operator()(size_t c) const { whole.Fetch(c), three.Fetch(c), two.Fetch(c); }
  static HWY_INLINE Lines OfColumns(const Int4Pointer* rows, size_t at) { return {rows, rows + 4, at, at}; }
  static HWY_INLINE Lines OfRows(const Int4Pointer* rows, size_t at) { return {rows, rows, at, at + kLine}; }
};

// While quarter kQuarter (0, 1) of `now` is read; `next` follows it; `lines`: of a half of a record.
template <size_t kQuarter>
struct RowsQuarter {
  const EightRecords &now, &next;
  size_t lines;

  HWY_INLINE FetchStep3 At(size_t g) const {
    const size_t s = g / 2, at = s * kLine, lower = s / 2 * kLine, upper = lower + lines / 2 * kLine;
    const Int4Pointer *same = next.first + 4 * kQuarter, *columns = now.second + s % 2 * 4;
    FetchScales(same, s / 2 % 4, s / 8);
    const auto of = [](const Int4Pointer* rows, size_t from)
                        HWY_ATTR { return FetchStep3::OfRows(rows, from); };
    if constexpr (kQuarter == 0) return {of(same, at), of(columns, upper), of(columns, lower)};
    return {of(same, at), of(next.first, at), of(columns, upper)};
  }
};

// While the second halves are read.
struct ColumnsQuarters {
  const EightRecords& next;
  size_t lines;

  HWY_INLINE FetchStep3 At(size_t g) const {
    using F = FetchStep3;
    const size_t s = g / 2, at = s * kLine, half = lines / 2 * kLine;
    FetchScales(next.second, s % 8, s / 8);
    if (g < lines)
      return {F::OfColumns(next.second, at), F::OfRows(next.first + 4, 2 * at),
              F::OfRows(next.first, 2 * at)};
    return {F::OfColumns(next.second, at), F::OfColumns(next.second, at - half),
            F::OfRows(next.first + 4, 2 * (at - half))};
  }
};

// Products of x with the first halves of a batch.
HWY_INLINE void DotEight(const Activations<Int4Pair>& row, const EightRecords& now, const EightRecords& next,
                         size_t n, float* h) {
  const size_t lines = n / (2 * kInt4Group);
  DotDigits(row, now.first, n, RowsQuarter<0>{now, next, lines}, h);
  DotDigits(row, now.first + 4, n, RowsQuarter<1>{now, next, lines}, h + 4);
}

// y += h times eight rows of n weights.
template <class Fetch>
HWY_INLINE void AddEight(float* y, const Int4Pointer* rows, const float* h, size_t n, Int4Digits digits,
                         Fetch fetch) {
  const Listed<Int4Pair> listed{rows};
  if (digits == Int4Digits::kOne) {
    AxpyDigits<1>(y, listed, 8, h, n, fetch);
  } else {
    AxpyDigits<3>(y, listed, 8, h, n, fetch);
  }
}

// Rows of a record that lie one behind the other: the kRows that follow twice and once as far ahead as
// `once`.
template <size_t kRows>
struct RowsAhead {
  const Int4Pointer *twice, *once;  // [kRows]

  struct Step {
    const Int4Pointer *twice, *once;
    size_t at;
    HWY_INLINE void operator()(size_t c) const {
      PrefetchL2(&twice[c].pairs->both + at);
      PrefetchL2(&once[c].pairs->both + at);
    }
  };
  HWY_INLINE Step At(size_t g) const {
    const size_t s = g / 2, i = kRows == 4 ? s / 2 : s;
    FetchScales(twice, i % kRows, i / kRows);
    return {twice, once, s * kLine};
  }
};

#endif  // SHADOWC_DIGITS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
