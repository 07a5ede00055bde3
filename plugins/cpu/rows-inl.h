// SPDX-License-Identifier: Apache-2.0
// The arithmetic of weight rows, once per SIMD target: dot products of rows of x with weight rows, and weight
// rows added to rows of y. Weights may be any type with a LoadWide below; everything accumulates in float32.
//
// Each output element is summed in an order that depends on the row length and the target alone: not on how
// many rows or weight rows one of these functions handles.
//
// No arrays of vectors: on SVE and RVV vectors have no size.

#if defined(SHADOWC_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_ROWS_INL_H_
#undef SHADOWC_CPU_ROWS_INL_H_
#else
#define SHADOWC_CPU_ROWS_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "types.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most as wide as half a group of int4, which a vector must not leave; no machine has wider ones.
using DF = hn::CappedTag<float, kInt4Group / 2>;
using VF = hn::Vec<DF>;

// Rows of x (or y) handled together: rows x 4 accumulators, 4 weight vectors and one more must fit the
// register file, which has 32 vectors on AVX-512, NEON and SVE, and 16 on older x86.
#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
inline constexpr size_t kMostRows = 2;
#else
inline constexpr size_t kMostRows = 4;
#endif
inline constexpr size_t kLine = 64;

HWY_INLINE VF LoadWide(DF df, const float* p) { return hn::LoadU(df, p); }
HWY_INLINE VF LoadWideN(DF df, const float* p, size_t n) { return hn::LoadN(df, p, n); }
// 16-bit floats: weights in bfloat16, a cache in float16.
template <class T, HWY_IF_SPECIAL_FLOAT(T)>
HWY_INLINE VF LoadWide(DF df, const T* p) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Rebind<T, DF> narrow;
  return hn::PromoteTo(df, hn::BitCast(narrow, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p))));
}
template <class T, HWY_IF_SPECIAL_FLOAT(T)>
HWY_INLINE VF LoadWideN(DF df, const T* p, size_t n) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Rebind<T, DF> narrow;
  return hn::PromoteTo(df, hn::BitCast(narrow, hn::LoadN(d16, reinterpret_cast<const uint16_t*>(p), n)));
}
HWY_INLINE VF LoadWide(DF df, const int8_t* p) {
  const hn::Rebind<int8_t, DF> d8;
  const hn::Rebind<int32_t, DF> d32;
  return hn::ConvertTo(df, hn::PromoteTo(d32, hn::LoadU(d8, p)));
}
HWY_INLINE VF LoadWideN(DF df, const int8_t* p, size_t n) {
  const hn::Rebind<int8_t, DF> d8;
  const hn::Rebind<int32_t, DF> d32;
  return hn::ConvertTo(df, hn::PromoteTo(d32, hn::LoadN(d8, p, n)));
}

// Into L2, not L1 (locality 2 is T1 on x86, PLDL2KEEP on Arm): measured, L1 hints lose a third of the
// bandwidth.
HWY_INLINE void PrefetchL2(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class W>
HWY_INLINE void PrefetchStep(const W* later, size_t elements) {
  for (size_t e = 0; e < elements; e += kLine / sizeof(W)) PrefetchL2(later + e);
}

// What a prefetch costs and brings depends on what else a core has to do. With 8-bit dot products it waits
// for memory; without, it waits for the conversion of weights to floats, and instructions count. Zen 4
// drops a prefetch that finds no free buffer (PrefetchRows).
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
inline constexpr size_t kPrefetchRounds = HWY_TARGET == HWY_AVX3_ZEN4 ? 6 : 1;
inline constexpr bool kPrefetchUnrolled = true;
template <class P>
inline constexpr bool kPrefetchInOrder = false;
#else
inline constexpr size_t kPrefetchRounds = 1;
inline constexpr bool kPrefetchUnrolled = false;
template <class P>  // of rows that are pointed to by P
inline constexpr bool kPrefetchInOrder = HWY_ARCH_X86 && std::is_same_v<P, const int8_t*>;
#endif

// Whether the rows' lines are fetched one at a time, between the rows that are read meanwhile. As many at
// once as there are rows take all miss buffers of an Intel core, and what is read from L2 waits for memory:
// calls of int8 take 0.97 to 1.01 of their time, dense FFNs of int4 0.94 to 0.99; on Zen 4 those 1.05.
inline constexpr bool kPrefetchOneByOne =
    HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL && HWY_TARGET != HWY_AVX3_ZEN4;

// Whether rows of int8 and int4 are read in an order in which they can be fetched several times, not at once
// (in_order-inl.h).
inline constexpr bool kReadInOrder = HWY_ARCH_X86 && HWY_TARGET == HWY_AVX3_ZEN4;

// Calls f(0) ... f(count - 1), kRounds times.
template <size_t kRounds, size_t kCount, class F>
HWY_INLINE void Unrolled(F f) {
  HWY_UNROLL(8)
  for (size_t round = 0; round < kRounds; ++round) {
    HWY_UNROLL(8)
    for (size_t c = 0; c < kCount; ++c) f(c);
  }
}
template <size_t kRounds, class F>
HWY_INLINE void InRounds(size_t count, F f) {
  if constexpr (kPrefetchUnrolled) {
    // As a loop, so few end in a branch that is mispredicted: int8 rows are added to y at 16 GB/s in place
    // of 27.
    if (count == 4) return Unrolled<kRounds, 4>(f);
    if (count == 8) return Unrolled<kRounds, 8>(f);
  }
  for (size_t round = 0; round < kRounds; ++round) {
    for (size_t c = 0; c < count; ++c) f(c);
  }
}

// Elements i ... i + elements of `count` rows, to be fetched while as many are read. In several rounds: a
// core whose miss buffers are all taken drops a prefetch (Zen 4 "prefetches" 240 GB/s from a memory that
// gives 40), and at full bandwidth they always are. Measured, four rows of 2 KiB at a time, of what one
// stream reads, in a slow and a fast memory: 88 and 65 % with one round, 92 and 77 % with three, 98 and 97 %
// with six; eight take more time than they save. On an Intel core calls of int8 take 0.79 to
// 0.93 of their time with one round in place of six.
//
// Where kPrefetchInOrder, rows of n elements that lie one behind the other are fetched in the order of
// memory, not side by side: a core of Zen 3 gets 17 in place of 14 GB/s of int8 where its memory gives 18.6.
// Rows that lie apart lose by it (records of 4 KiB, a fifth of them: 10.9 in place of 11.9), and so do the
// longer rows of float32.
template <class Row>
HWY_INLINE void PrefetchRows(Row row, size_t count, size_t i, size_t elements, size_t n) {
  if constexpr (kPrefetchInOrder<decltype(row(0))>) {
    if (count > 1 && row(1) == row(0) + n) {
      size_t at = i * count, c = 0;
      for (; at >= n; at -= n) ++c;
      const auto from = row(c) + at;
      return PrefetchStep(from, count * elements);
    }
  }
  InRounds<kPrefetchRounds>(count, [=](size_t c) HWY_ATTR { PrefetchStep(row(c) + i, elements); });
}

// A position in int4 weights, for all that takes a pointer to other weights; what is loaded has its scale.
// Offsets are counted from the beginning of a group. Trivial, as arrays of pointers are: some are filled for
// every few rows.
struct Int4Pointer {
  const Int4Pair* pairs;
  const float* scales;
  // 4: these are the high halves of the pairs. As wide as the rest: what is stored as four bytes and copied
  // as eight, with the padding, waits until it is in the cache.
  int64_t shift;

  HWY_INLINE bool operator==(std::nullptr_t) const { return pairs == nullptr; }
  HWY_INLINE Int4Pointer operator+(size_t n) const {
    constexpr size_t kHalf = kInt4Group / 2;
    return {pairs + n / kInt4Group * kHalf + n % kHalf, scales + n / kInt4Group, n / kHalf % 2 == 0 ? 0 : 4};
  }
};
HWY_INLINE VF LoadWide(DF df, Int4Pointer p) {
  const hn::Rebind<uint8_t, DF> d8;
  const hn::Rebind<int32_t, DF> d32;
  const auto pairs = hn::PromoteTo(d32, hn::LoadU(d8, &p.pairs->both));
  const auto stored = hn::And(hn::ShiftRightSame(pairs, static_cast<int>(p.shift)), hn::Set(d32, 15));
  return hn::Mul(hn::ConvertTo(df, hn::Sub(stored, hn::Set(d32, 8))), hn::Set(df, *p.scales));
}
// Rows are whole groups: there is no rest.
HWY_INLINE VF LoadWideN(DF df, Int4Pointer p, size_t) { return LoadWide(df, p); }
HWY_INLINE void PrefetchStep(Int4Pointer later, size_t elements) {
  for (size_t e = 0; e < elements; e += 2 * kLine) PrefetchL2((later + e).pairs);
  const size_t groups = elements / kInt4Group;
  for (size_t g = 0; g < groups; g += kLine / sizeof(float)) PrefetchL2(later.scales + g);
}

// How weights of type W are pointed to, and how many of them lie in a line.
template <class W>
using Pointer = std::conditional_t<kIsInt4<W>, Int4Pointer, const W*>;
template <class W>
constexpr size_t LineElements(const W*) {
  return kLine / sizeof(W);
}
constexpr size_t LineElements(Int4Pointer) { return 2 * kLine; }

template <class W>
HWY_INLINE Pointer<W> PointerOf(const void* w, const float* scales) {
  if constexpr (kIsInt4<W>) {
    return {static_cast<const Int4Pair*>(w), scales, 0};
  } else {
    return static_cast<const W*>(w);
  }
}

// The factor that products with record row `row` still lack.
template <class W>
HWY_INLINE float RowScale(const float* scales, size_t row) {
  return kIsInt4<W> ? 1.0f : scales[row];
}

// Where weight row k lies: at a fixed stride, or listed.
template <class W>
struct Strided {
  Pointer<W> base;
  size_t stride;
  HWY_INLINE Pointer<W> operator()(size_t k) const { return base + k * stride; }
};
template <class W>
struct Listed {
  const Pointer<W>* rows;
  HWY_INLINE Pointer<W> operator()(size_t k) const { return rows[k]; }
};

// out[0 ... 3] = the sums of four vectors, all at once: one at a time costs as much as the products of a
// short row.
HWY_INLINE void Store4(float* out, VF a, VF b, VF c, VF d) {
  const DF df;
  const hn::RepartitionToWide<DF> pairs;
  const hn::FixedTag<float, 4> four;
  const VF ab = hn::Add(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b));
  const VF cd = hn::Add(hn::InterleaveLower(df, c, d), hn::InterleaveUpper(df, c, d));
  const auto ab2 = hn::BitCast(pairs, ab), cd2 = hn::BitCast(pairs, cd);
  const VF blocks = hn::Add(hn::BitCast(df, hn::InterleaveLower(pairs, ab2, cd2)),
                            hn::BitCast(df, hn::InterleaveUpper(pairs, ab2, cd2)));
  alignas(64) float lanes[kInt4Group / 2];
  hn::StoreU(blocks, df, lanes);
  auto sum = hn::LoadU(four, lanes);
  for (size_t i = 4; i < hn::Lanes(df); i += 4) sum = hn::Add(sum, hn::LoadU(four, lanes + i));
  hn::StoreU(sum, four, out);
}

// Dot products of kRows rows of x with 4 weight rows: out[r * out_stride + c]. `later`, if not null, points
// to 4 further weight rows to prefetch.
template <size_t kRows, class P>
HWY_INLINE void DotTile(const float* const* x, P w0, P w1, P w2, P w3, size_t n, const P* later, float* out,
                        size_t out_stride) {
  static_assert(kRows == 1 || kRows == 2 || kRows == 4);
  const DF df;
  const size_t lanes = hn::Lanes(df), line = HWY_MAX(lanes, LineElements(w0));
  const float *x0 = x[0], *x1 = x[kRows > 1 ? 1 : 0], *x2 = x[kRows > 2 ? 2 : 0], *x3 = x[kRows > 2 ? 3 : 0];
  const VF zero = hn::Zero(df);
  VF a00 = zero, a01 = zero, a02 = zero, a03 = zero, a10 = zero, a11 = zero, a12 = zero, a13 = zero;
  VF a20 = zero, a21 = zero, a22 = zero, a23 = zero, a30 = zero, a31 = zero, a32 = zero, a33 = zero;
  const auto accumulate = [&](VF b0, VF b1, VF b2, VF b3, auto load_x) HWY_ATTR {
    VF v = load_x(x0);
    a00 = hn::MulAdd(b0, v, a00), a01 = hn::MulAdd(b1, v, a01);
    a02 = hn::MulAdd(b2, v, a02), a03 = hn::MulAdd(b3, v, a03);
    if constexpr (kRows > 1) {
      v = load_x(x1);
      a10 = hn::MulAdd(b0, v, a10), a11 = hn::MulAdd(b1, v, a11);
      a12 = hn::MulAdd(b2, v, a12), a13 = hn::MulAdd(b3, v, a13);
    }
    if constexpr (kRows > 2) {
      v = load_x(x2);
      a20 = hn::MulAdd(b0, v, a20), a21 = hn::MulAdd(b1, v, a21);
      a22 = hn::MulAdd(b2, v, a22), a23 = hn::MulAdd(b3, v, a23);
      v = load_x(x3);
      a30 = hn::MulAdd(b0, v, a30), a31 = hn::MulAdd(b1, v, a31);
      a32 = hn::MulAdd(b2, v, a32), a33 = hn::MulAdd(b3, v, a33);
    }
  };
  size_t i = 0;
  for (; i + line <= n; i += line) {
    if (later != nullptr) PrefetchRows([=](size_t c) HWY_ATTR { return later[c]; }, 4, i, line, n);
    for (size_t j = i; j < i + line; j += lanes) {
      accumulate(LoadWide(df, w0 + j), LoadWide(df, w1 + j), LoadWide(df, w2 + j), LoadWide(df, w3 + j),
                 [=](const float* row) HWY_ATTR { return hn::LoadU(DF(), row + j); });
    }
  }
  for (; i < n; i += lanes) {
    const size_t m = HWY_MIN(lanes, n - i);
    accumulate(LoadWideN(df, w0 + i, m), LoadWideN(df, w1 + i, m), LoadWideN(df, w2 + i, m),
               LoadWideN(df, w3 + i, m),
               [=](const float* row) HWY_ATTR { return hn::LoadN(DF(), row + i, m); });
  }
  Store4(out, a00, a01, a02, a03);
  if constexpr (kRows > 1) Store4(out + out_stride, a10, a11, a12, a13);
  if constexpr (kRows > 2) {
    Store4(out + 2 * out_stride, a20, a21, a22, a23);
    Store4(out + 3 * out_stride, a30, a31, a32, a33);
  }
}

// y[r] += sum over k < count of h[r * h_stride + k * h_step] * row(k), k ascending. Row k of `later` is
// prefetched as row k is read.
template <size_t kRows, class Row, class Later>
HWY_INLINE void AxpyTile(float* const* y, Row row, size_t count, const float* h, size_t h_stride, size_t n,
                         size_t later_count, Later later, size_t h_step = 1) {
  static_assert(kRows == 1 || kRows == 2 || kRows == 4);
  const DF df;
  const size_t lanes = hn::Lanes(df);
  float *y0 = y[0], *y1 = y[kRows > 1 ? 1 : 0], *y2 = y[kRows > 2 ? 2 : 0], *y3 = y[kRows > 2 ? 3 : 0];
  const float *h0 = h, *h1 = h + h_stride, *h2 = h + 2 * h_stride, *h3 = h + 3 * h_stride;
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    const bool one_by_one = kPrefetchOneByOne && later_count == count;
    if (!one_by_one) PrefetchRows(later, later_count, i, 4 * lanes, n);
    const size_t i1 = i + lanes, i2 = i1 + lanes, i3 = i2 + lanes;
    VF a00 = hn::LoadU(df, y0 + i), a01 = hn::LoadU(df, y0 + i1);
    VF a02 = hn::LoadU(df, y0 + i2), a03 = hn::LoadU(df, y0 + i3);
    VF a10 = hn::LoadU(df, y1 + i), a11 = hn::LoadU(df, y1 + i1);
    VF a12 = hn::LoadU(df, y1 + i2), a13 = hn::LoadU(df, y1 + i3);
    VF a20 = hn::LoadU(df, y2 + i), a21 = hn::LoadU(df, y2 + i1);
    VF a22 = hn::LoadU(df, y2 + i2), a23 = hn::LoadU(df, y2 + i3);
    VF a30 = hn::LoadU(df, y3 + i), a31 = hn::LoadU(df, y3 + i1);
    VF a32 = hn::LoadU(df, y3 + i2), a33 = hn::LoadU(df, y3 + i3);
    for (size_t k = 0; k < count; ++k) {
      if (one_by_one) PrefetchStep(later(k) + i, 4 * lanes);
      const auto w = row(k);
      const VF b0 = LoadWide(df, w + i), b1 = LoadWide(df, w + i1);
      const VF b2 = LoadWide(df, w + i2), b3 = LoadWide(df, w + i3);
      VF v = hn::Set(df, h0[k * h_step]);
      a00 = hn::MulAdd(b0, v, a00), a01 = hn::MulAdd(b1, v, a01);
      a02 = hn::MulAdd(b2, v, a02), a03 = hn::MulAdd(b3, v, a03);
      if constexpr (kRows > 1) {
        v = hn::Set(df, h1[k * h_step]);
        a10 = hn::MulAdd(b0, v, a10), a11 = hn::MulAdd(b1, v, a11);
        a12 = hn::MulAdd(b2, v, a12), a13 = hn::MulAdd(b3, v, a13);
      }
      if constexpr (kRows > 2) {
        v = hn::Set(df, h2[k * h_step]);
        a20 = hn::MulAdd(b0, v, a20), a21 = hn::MulAdd(b1, v, a21);
        a22 = hn::MulAdd(b2, v, a22), a23 = hn::MulAdd(b3, v, a23);
        v = hn::Set(df, h3[k * h_step]);
        a30 = hn::MulAdd(b0, v, a30), a31 = hn::MulAdd(b1, v, a31);
        a32 = hn::MulAdd(b2, v, a32), a33 = hn::MulAdd(b3, v, a33);
      }
    }
    const auto store = [=](float* to, VF a, VF b, VF c, VF d) HWY_ATTR {
      hn::StoreU(a, DF(), to + i), hn::StoreU(b, DF(), to + i1);
      hn::StoreU(c, DF(), to + i2), hn::StoreU(d, DF(), to + i3);
    };
    store(y0, a00, a01, a02, a03);
    if constexpr (kRows > 1) store(y1, a10, a11, a12, a13);
    if constexpr (kRows > 2) store(y2, a20, a21, a22, a23), store(y3, a30, a31, a32, a33);
  }
  for (; i < n; i += lanes) {
    const size_t m = HWY_MIN(lanes, n - i);
    for (size_t r = 0; r < kRows; ++r) {
      VF a = hn::LoadN(df, y[r] + i, m);
      for (size_t k = 0; k < count; ++k) {
        a = hn::MulAdd(LoadWideN(df, row(k) + i, m), hn::Set(df, h[r * h_stride + k * h_step]), a);
      }
      hn::StoreN(a, df, y[r] + i, m);
    }
  }
}

// Calls f(integral_constant<kRows>, first) so that the calls cover rows 0 ... count - 1 in groups of 4, 2, 1.
template <class F>
HWY_INLINE void ForRowGroups(size_t count, F&& f) {
  size_t r = 0;
  if constexpr (kMostRows == 4) {
    for (; r + 4 <= count; r += 4) f(std::integral_constant<size_t, 4>(), r);
  }
  for (; r + 2 <= count; r += 2) f(std::integral_constant<size_t, 2>(), r);
  if (r < count) f(std::integral_constant<size_t, 1>(), r);
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
