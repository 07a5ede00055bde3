// SPDX-License-Identifier: Apache-2.0
// One row of the FFN over the active neurons of one piece: the decode path, bound by memory bandwidth. Once
// per SIMD target.

#if defined(SHADOWC_CPU_FFN_ROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_FFN_ROW_INL_H_
#undef SHADOWC_CPU_FFN_ROW_INL_H_
#else
#define SHADOWC_CPU_FFN_ROW_INL_H_
#endif

#include <algorithm>

#include "digits-inl.h"
#include "int4-inl.h"
#include "int4_in_order-inl.h"
#include "int4_sum-inl.h"
#include "norm-inl.h"
#include "rows-inl.h"
#include "sparse_ffn.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

HWY_INLINE float Relu(float u) { return u < 0.0f ? 0.0f : u; }  // NaN stays

template <class W>
HWY_INLINE ReadCount CountRead(size_t records, size_t second_halves, size_t width) {
  const size_t bytes = (records + second_halves) * RowBytes<W>(width);
  return {static_cast<int64_t>(records), static_cast<int64_t>(bytes)};
}

// How many list entries ahead to prefetch: 16 KiB of what is certain to be read, which covers the latency of
// memory at a core's full bandwidth (measured flat from 12 to 24 KiB), but 2 to 8 entries. Those that are
// computed together are also fetched together, so it may be kMostAhead.
inline constexpr size_t kMostAhead = std::max<size_t>(8, kInt4Rows);
HWY_INLINE size_t Ahead(size_t bytes_per_entry) {
  return std::clamp<size_t>((size_t{16} << 10) / bytes_per_entry, 2, 8);
}

// The active neurons of one row within one piece, and after them the later ones of the same run of pieces and
// the first ones of the run that this thread will probably take next: those are only prefetched.
struct Neurons {
  const uint32_t* list;
  size_t count, with_next;
  bool fetched;  // the first ones, with what came before them
  uint32_t operator[](size_t k) const { return list[std::min(k, with_next - 1)]; }
  uint32_t Own(size_t k) const { return list[std::min(k, count - 1)]; }
};

// h of kCount neurons from their dot products with x.
template <size_t kCount, class W>
HWY_INLINE void Activate(const FfnArgs& a, const Neurons& neurons, size_t k, float* h) {
  for (size_t c = 0; c < kCount; ++c) {
    const size_t f = neurons.Own(k + c);
    h[c] = Relu(h[c] * RowScale<W>(a.scales, 2 * f) + a.b1[f]);
  }
}

// A miss of these few bytes would hold up as much as one of the weights. Scales of int4 are fetched with
// them.
template <class W>
HWY_INLINE void PrefetchFactors(const FfnArgs& a, size_t neuron) {
  if constexpr (!kIsInt4<W>) __builtin_prefetch(a.scales + 2 * neuron);
  __builtin_prefetch(a.b1 + neuron);
}

// Neurons that are computed together.
template <class W>
inline constexpr size_t kTogether = kIsInt4<W> ? kInt4Rows : 4;

// Four neurons whose halves are read in order (in_order-inl.h); at the end of a piece the last one several
// times.
struct FourInOrder {
  const int8_t *first[4], *second[4];
  float h[4];

  FourInOrder(const FfnArgs& a, const Neurons& neurons, size_t k) {
    for (size_t c = 0; c < 4; ++c) {
      const size_t f = k < neurons.count ? neurons.Own(k + c) : neurons[k + c];
      first[c] = static_cast<const int8_t*>(a.w) + f * 2 * a.width;
      second[c] = first[c] + a.width;
      PrefetchFactors<int8_t>(a, f);
    }
  }
};

// All whole records of the piece by fours: their first halves, then their second ones. What a neuron adds
// that is there only to fill the last four is 0. Sets y.
template <class W>
void FoursInOrder(const FfnArgs& a, const Activations<W>& row, const Neurons& neurons, float* y) {
  const size_t width = a.width;
  FourInOrder now(a, neurons, 0);
  for (size_t k = 0; k < neurons.count; k += 4) {
    const size_t after = std::min(k + 4, neurons.count);
    const FourInOrder next(a, neurons, after);
    DotsInOrder<Order::kByColumn>(row, now.first, width, now.second, now.h);
    Activate<4, W>(a, neurons, k, now.h);
    for (size_t c = 0; c < 4; ++c)
      now.h[c] = k + c < after ? now.h[c] * RowScale<W>(a.scales, 2 * neurons[k + c] + 1) : 0.0f;
    const bool more = after < neurons.with_next;
    const int8_t* const* later = more ? next.first : nullptr;
    if (k == 0) {
      AddInOrder<Order::kByRow, 4, true>(y, now.second, now.h, width, later);
    } else {
      AddInOrder<Order::kByRow, 4>(y, now.second, now.h, width, later);
    }
    now = next;
  }
}

#if SHADOWC_DIGITS

// The k-th neuron and the seven after it; at the end of a piece the last one several times.
HWY_INLINE EightRecords EightOf(const FfnArgs& a, const Neurons& neurons, size_t k) {
  EightRecords records;
  const Int4Pointer w = PointerOf<Int4Pair>(a.w, a.scales);
  for (size_t c = 0; c < 8; ++c) {
    const size_t f = k < neurons.count ? neurons.Own(k + c) : neurons[k + c];
    records.first[c] = w + f * 2 * a.width;
    records.second[c] = records.first[c] + a.width;
    PrefetchFactors<Int4Pair>(a, f);
  }
  return records;
}

// As FoursInOrder, with eight records of int4.
inline void EightsInOrder(const FfnArgs& a, const Activations<Int4Pair>& row, const Neurons& neurons,
                          float* y) {
  std::fill(y, y + a.width, 0.0f);
  EightRecords now = EightOf(a, neurons, 0);
  for (size_t k = 0; k < neurons.count; k += 8) {
    const size_t after = std::min(k + 8, neurons.count);
    const EightRecords next = EightOf(a, neurons, after);  // the last one, where nothing is known to follow
    float h[8];
    DotEight(row, now, next, a.width, h);
    Activate<8, Int4Pair>(a, neurons, k, h);
    std::fill(h + (after - k), h + 8, 0.0f);
    AddEight(y, now.second, h, a.width, a.int4_digits, ColumnsQuarters{next, a.width / (2 * kInt4Group)});
    now = next;
  }
}

#endif  // SHADOWC_DIGITS

// Whether whole records are read so.
template <class W>
HWY_INLINE bool RecordsInOrder(size_t width) {
  return ReadsInOrder<W>(width) || (kIsInt4<W> && ReadsInOrder<int8_t>(width));
}

// Sets y to what at least one neuron adds. Whole records; while they are read, as many later ones are fetched
// into L2, line by line.
template <class W>
ReadCount RowWholeRecords(const FfnArgs& a, const OneRowOfX<W>& x, const Neurons& neurons, float* y) {
  constexpr size_t kCount = kTogether<W>;
  constexpr bool kInOrder = kPrefetchInOrder<Pointer<W>>;
  const Pointer<W> w = PointerOf<W>(a.w, a.scales);
  const size_t width = a.width, ahead = std::max(kCount, Ahead(2 * RowElements<W>(width) * sizeof(W)));
  x.Prefetch();
  // What no loop before has fetched.
  for (size_t k = 0; !(RecordsInOrder<W>(width) && neurons.fetched) && k < std::min(ahead, neurons.with_next);
       ++k)
    PrefetchStep(w + size_t{neurons[k]} * 2 * width, 2 * width);
  const Activations<W>* row = x.Get();
  if constexpr (kReadInOrder && std::is_same_v<W, int8_t>) {
    if (ReadsInOrder<W>(width) && row->Exact()) {
      FoursInOrder<W>(a, *row, neurons, y);
      return CountRead<W>(neurons.count, neurons.count, a.width);
    }
  }
#if SHADOWC_DIGITS
  if constexpr (kReadInOrder && kIsInt4<W>) {
    if (RecordsInOrder<W>(width) && row->Exact()) {
      EightsInOrder(a, *row, neurons, y);
      return CountRead<W>(neurons.count, neurons.count, a.width);
    }
  }
#endif
  std::fill(y, y + width, 0.0f);
  for (size_t k = 0; k < neurons.count; k += kCount) {
    // The first half of `later` is fetched while first halves of records are read, the other with second
    // ones. Records that do not follow each other in memory are fetched side by side.
    Pointer<W> first[kCount], second[kCount], later[2 * kCount];
    const bool in_order = kInOrder && neurons[k + ahead + kCount - 1] - neurons[k + ahead] == kCount - 1;
    for (size_t c = 0; c < kCount; ++c) {
      first[c] = w + size_t{neurons.Own(k + c)} * 2 * width;
      second[c] = first[c] + width;
      const Pointer<W> record = w + size_t{neurons[k + ahead + c]} * 2 * width;
      later[in_order ? 2 * c : c] = record;
      later[in_order ? 2 * c + 1 : kCount + c] = record + width;
    }
    const bool more = k + ahead < neurons.with_next;
    for (size_t c = 0; c < kCount; ++c) PrefetchFactors<W>(a, neurons[k + ahead + c]);
    const size_t here = std::min(kCount, neurons.count - k);
    float h[kCount] = {};
    for (size_t c = 0; c < here; c += 4)
      DotRows<1>(&row, first + c, width, more ? later + c : nullptr, h + c, 4);
    Activate<kCount, W>(a, neurons, k, h);
    for (size_t c = 0; c < here; ++c) h[c] *= RowScale<W>(a.scales, 2 * neurons[k + c] + 1);
    AxpyRows<1>(&y, Listed<W>{second}, here, h, 0, width, a.int4_digits, more ? kCount : 0,
                Listed<W>{later + kCount});
  }
  return CountRead<W>(neurons.count, neurons.count, a.width);
}

// The fc2 halves of neurons that turned out nonzero, in order, until they are added to y. Int4 rows are added
// with those that were computed with them, as whole records are: the same bits.
template <class W>
class Nonzero {
 public:
  // As many wait for their lines to arrive.
  static constexpr size_t kHold = std::max<size_t>(8, kTogether<W>);

  Nonzero(const FfnArgs& a, float* y) : width_(a.width), digits_(a.int4_digits), y_(y) {}
  size_t Added() const { return added_; }

  void Push(Pointer<W> half, float factor) {
    half_[queued_] = half;
    factor_[queued_++] = factor;
    if (added_ == 0 && queued_ <= 4) PrefetchStep(half, width_);
  }
  // After the neurons that were computed together.
  HWY_INLINE void EndGroup(size_t pushed) {
    if (kIsInt4<W> && pushed != 0) size_[groups_++] = pushed;
    while (queued_ >= kHold) AddFirst();
  }
  HWY_INLINE void Finish() {
    while (queued_ != 0) AddFirst();
  }

 private:
  static constexpr size_t kMost = kHold - 1 + kTogether<W>;

  HWY_INLINE void AddFirst() {
    const size_t count = kIsInt4<W> ? size_[0] : std::min<size_t>(queued_, 4);
    const size_t rest = queued_ - count;
    AxpyRows<1>(&y_, Listed<W>{half_}, count, factor_, 0, width_, digits_, std::min(rest, kTogether<W>),
                Listed<W>{half_ + count});
    std::copy(half_ + count, half_ + queued_, half_);
    std::copy(factor_ + count, factor_ + queued_, factor_);
    if (kIsInt4<W>) std::copy(size_ + 1, size_ + groups_--, size_);
    added_ += count;
    queued_ = rest;
  }

  size_t width_;
  Int4Digits digits_;
  float* y_;
  Pointer<W> half_[kMost + kTogether<W>];
  float factor_[kMost + kTogether<W>];
  size_t size_[kMost + 1];
  size_t queued_ = 0, groups_ = 0, added_ = 0;
};

// Sets y likewise. Only fc1 halves are certain to be needed. The fc2 halves of neurons that turn out nonzero
// are added while the next ones are fetched.
template <class W>
ReadCount RowSkippingZeros(const FfnArgs& a, const OneRowOfX<W>& x, const Neurons& neurons, float* y) {
  constexpr size_t kCount = kTogether<W>;
  const Pointer<W> w = PointerOf<W>(a.w, a.scales);
  const size_t width = a.width;
  const size_t ahead =
      ReadsInOrder<W>(width) ? kCount : std::max(kCount, Ahead(RowElements<W>(width) * sizeof(W)));
  x.Prefetch();
  for (size_t k = 0; k < std::min(ahead, neurons.count); ++k)
    PrefetchStep(w + size_t{neurons[k]} * 2 * width, width);
  const Activations<W>* row = x.Get();
  std::fill(y, y + width, 0.0f);
  Nonzero<W> nonzero(a, y);
  for (size_t k = 0; k < neurons.count; k += kCount) {
    Pointer<W> first[kCount], later_first[kCount];
    for (size_t c = 0; c < kCount; ++c) {
      first[c] = w + size_t{neurons.Own(k + c)} * 2 * width;
      later_first[c] = w + size_t{neurons[k + ahead + c]} * 2 * width;
      PrefetchFactors<W>(a, neurons[k + ahead + c]);
    }
    float h[kCount] = {};
    const size_t here = std::min(kCount, neurons.count - k);
    for (size_t c = 0; c < here; c += 4)
      DotRows<1>(&row, first + c, width, k + ahead < neurons.with_next ? later_first + c : nullptr, h + c, 4);
    Activate<kCount, W>(a, neurons, k, h);
    size_t pushed = 0;
    for (size_t c = 0; c < here; ++c) {
      if (h[c] == 0.0f) continue;
      nonzero.Push(first[c] + width, h[c] * RowScale<W>(a.scales, 2 * neurons[k + c] + 1));
      ++pushed;
    }
    nonzero.EndGroup(pushed);
  }
  nonzero.Finish();
  return CountRead<W>(neurons.count, nonzero.Added(), width);
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
