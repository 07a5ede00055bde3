// SPDX-License-Identifier: Apache-2.0
// One row with int8 weight rows, read in an order in which every line can be fetched three times, at three
// distances. Once per SIMD target; used where kReadInOrder.
//
// A prefetch that is dropped (rows-inl.h) can be asked for again at once, or later. Six times at once costs
// more than the products: a loop of those on one core of Zen 4 reads 30 GB/s from L2, with three at different
// distances 43, and on two cores 53 and 59 GB/s of a memory that gives a stream 57, 34 and 35 of one that
// gives 35. In that loop four rows are multiplied one behind the other, not side by side, and what follows is
// fetched a batch of four rows ahead, three quarters and half of it: 8, 6 and 4 KiB in rows of 2048. Two
// distances reach 54 and 34, three that are further off (8, 12 and 16) 55 and 34.
//
// Calls take, of their time with six at once: FFNs 0.91 to 0.99, with one thread 0.93 to 0.95, with zeros
// skipped 0.83 to 0.89; attention 0.97 to 0.99. Measured and left out: rows side by side for dot products too
// (1.00 to 1.01), second halves of records fetched row by row (1.00 to 1.12), the next four's dot products
// before these are added, so that nothing waits for sums (1.00 to 1.03 of what it takes as it is).

#if defined(SHADOWC_CPU_IN_ORDER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_IN_ORDER_INL_H_
#undef SHADOWC_CPU_IN_ORDER_INL_H_
#else
#define SHADOWC_CPU_IN_ORDER_INL_H_
#endif

#include <cstddef>
#include <type_traits>

#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// Whether rows of n weights of type W are read so: a quarter of a row is whole lines, and half a batch is far
// enough ahead. Those of int4 are (int4_in_order-inl.h) where those of int8 would be.
template <class W>
HWY_INLINE bool ReadsInOrder(size_t n) {
  return kReadInOrder && std::is_same_v<W, int8_t> && n % (4 * kLine) == 0 && n >= 2048;
}

// How a batch of rows is read: one row behind the other, or the rows side by side.
enum class Order { kByRow, kByColumn };

// Fetches what is read of a batch of kRows rows in step i of its quarter; a row has n bytes, a quarter n / 4
// steps of a line of each row, or kRows lines of one row. Nothing if `rows` is null.
template <Order kOrder, size_t kRows>
HWY_INLINE void FetchStep(const int8_t* const* rows, size_t n, size_t quarter, size_t i) {
  if (rows == nullptr) return;
  if constexpr (kOrder == Order::kByRow) {
    static_assert(kRows == 4);
    HWY_UNROLL(4)
    for (size_t k = 0; k < 4; ++k) PrefetchL2(rows[quarter] + 4 * i + k * kLine);
  } else {
    HWY_UNROLL(8)
    for (size_t k = 0; k < kRows; ++k) PrefetchL2(rows[k] + quarter * (n / 4) + i);
  }
}

// The same kAhead quarters after `quarter` of the batch that is read: there, or in the next one.
template <Order kOrder, Order kNextOrder, size_t kRows, size_t kQuarter, size_t kAhead>
HWY_INLINE void FetchAhead(const int8_t* const* rows, const int8_t* const* next, size_t n, size_t i) {
  constexpr size_t at = kQuarter + kAhead;
  if constexpr (at < 4) {
    FetchStep<kOrder, kRows>(rows, n, at, i);
  } else {
    FetchStep<kNextOrder, kRows>(next, n, at - 4, i);
  }
}

// Calls f(integral_constant<quarter>) for all four.
template <class F>
HWY_INLINE void ForQuarters(F f) {
  f(std::integral_constant<size_t, 0>()), f(std::integral_constant<size_t, 1>());
  f(std::integral_constant<size_t, 2>()), f(std::integral_constant<size_t, 3>());
}

// y += the sum over k < kRows of h[k] * rows[k], as AxpyTile: the same bits. The next batch has as many rows;
// null: it is not known. kFresh: y is not read, but taken for zeros.
template <Order kNextOrder, size_t kRows, bool kFresh = false>
HWY_INLINE void AddInOrder(float* HWY_RESTRICT y, const int8_t* const* rows, const float* h, size_t n,
                           const int8_t* const* next) {
  constexpr size_t kLanes = kLine / 4;
  const DF df;
  static_assert(hn::MaxLanes(df) * kRows == kLanes * kRows);
  ForQuarters([&](auto quarter) HWY_ATTR {
    for (size_t step = 0; step < n / 4; step += kLine) {
      FetchAhead<Order::kByColumn, kNextOrder, kRows, quarter(), 4>(rows, next, n, step);
      FetchAhead<Order::kByColumn, kNextOrder, kRows, quarter(), 3>(rows, next, n, step);
      FetchAhead<Order::kByColumn, kNextOrder, kRows, quarter(), 2>(rows, next, n, step);
      const size_t i = quarter() * (n / 4) + step;
      float* to = y + i;
      const auto sum = [=](const float* p) HWY_ATTR { return kFresh ? hn::Zero(df) : hn::LoadU(df, p); };
      VF a0 = sum(to), a1 = sum(to + kLanes), a2 = sum(to + 2 * kLanes), a3 = sum(to + 3 * kLanes);
      HWY_UNROLL(8)
      for (size_t k = 0; k < kRows; ++k) {
        const int8_t* w = rows[k] + i;
        const VF v = hn::Set(df, h[k]);
        a0 = hn::MulAdd(LoadWide(df, w), v, a0), a1 = hn::MulAdd(LoadWide(df, w + kLanes), v, a1);
        a2 = hn::MulAdd(LoadWide(df, w + 2 * kLanes), v, a2);
        a3 = hn::MulAdd(LoadWide(df, w + 3 * kLanes), v, a3);
      }
      hn::StoreU(a0, df, to), hn::StoreU(a1, df, to + kLanes);
      hn::StoreU(a2, df, to + 2 * kLanes), hn::StoreU(a3, df, to + 3 * kLanes);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
