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

// What is fetched while quarter kQuarter of `now` is read: what is read a whole batch, three and two quarters
// later. `next` follows `now`.
template <size_t kQuarter>
struct BatchFetch {
  const EightRecords &now, &next;
  size_t lines;  // of a half of a record

  struct Step {
    const Int4Pointer *whole, *three, *two;  // rows
    size_t whole_at, three_at, two_at;       // bytes
    HWY_INLINE void operator()(size_t c) const {
      constexpr size_t kRows = kQuarter < 2 ? 4 : 8;
      // A quarter of columns lasts half as many steps as one of rows, and fetches two lines of them in each.
      const auto fetch = [c](const Int4Pointer* rows, size_t at, bool of_columns) HWY_ATTR {
        const size_t row = of_columns || kRows == 4 ? c : c % 4, line = of_columns || kRows == 4 ? 0 : c / 4;
        PrefetchL2(&rows[row].pairs->both + at + line * kLine);
      };
      fetch(whole, whole_at, kQuarter >= 2);
      fetch(three, three_at, (kQuarter + 3) % 4 >= 2);
      fetch(two, two_at, (kQuarter + 2) % 4 >= 2);
    }
  };

  HWY_INLINE Step At(size_t g) const {
    const size_t s = g / 2;
    if constexpr (kQuarter < 2) {
      FetchScales(next.first + 4 * kQuarter, s / 2 % 4, s / 8);
      const Int4Pointer* columns = now.second + s % 2 * 4;
      const size_t at = s * kLine, half = s / 2 * kLine, upper = half + lines / 2 * kLine;
      if constexpr (kQuarter == 0) return {next.first, columns, columns, at, upper, half};
      return {next.first + 4, next.first, columns, at, at, upper};
    } else {
      FetchScales(next.second, s % 8, s / 8);
      const size_t at = s * kLine;
      if constexpr (kQuarter == 2) return {next.second, next.first + 4, next.first, at, 2 * at, 2 * at};
      const size_t rows_at = 2 * (at - lines / 2 * kLine);
      return {next.second, next.second, next.first + 4, at, at - lines / 2 * kLine, rows_at};
    }
  }

 private:
  static HWY_INLINE void FetchScales(const Int4Pointer* rows, size_t row, size_t line) {
    PrefetchL2(rows[row].scales + line * (kLine / sizeof(float)));
  }
};

// Products of x with the first halves of a batch.
HWY_INLINE void DotEight(const Activations<Int4Pair>& row, const EightRecords& now, const EightRecords& next,
                         size_t n, float* h) {
  const size_t lines = n / (2 * kInt4Group);
  DotDigits(row, now.first, n, BatchFetch<0>{now, next, lines}, h);
  DotDigits(row, now.first + 4, n, BatchFetch<1>{now, next, lines}, h + 4);
}

// y += h times rows of n weights.
template <class Fetch>
HWY_INLINE void AddDigits(float* y, const Int4Pointer* rows, size_t count, const float* h, size_t n,
                          Int4Digits digits, Fetch fetch) {
  const Listed<Int4Pair> listed{rows};
  if (digits == Int4Digits::kOne) {
    AxpyDigits<1>(y, listed, count, h, 0, n / kInt4Group, fetch);
  } else {
    AxpyDigits<3>(y, listed, count, h, 0, n / kInt4Group, fetch);
  }
}

// y += the second halves of a batch, times h.
template <size_t kPlaces>
HWY_INLINE void AddEight(float* y, const EightRecords& now, const EightRecords& next, const float* h,
                         size_t n) {
  const size_t lines = n / (2 * kInt4Group);
  const Listed<Int4Pair> rows{now.second};
  AxpyDigits<kPlaces>(y, rows, 8, h, 0, lines, BatchFetch<2>{now, next, lines});
  AxpyDigits<kPlaces>(y, rows, 8, h, lines, 2 * lines, BatchFetch<3>{now, next, lines});
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
    const size_t s = g / 2;
    PrefetchL2(twice[s % kRows].scales + s / kRows * (kLine / sizeof(float)));
    return {twice, once, s * kLine};
  }
};

#endif  // SHADOWC_DIGITS

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
