// SPDX-License-Identifier: Apache-2.0
// Products of rows of x with all rows of a matrix, once per SIMD target.

#if defined(SHADOWC_CPU_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_PRODUCT_INL_H_
#undef SHADOWC_CPU_PRODUCT_INL_H_
#else
#define SHADOWC_CPU_PRODUCT_INL_H_
#endif

#include <algorithm>

#include "arena.h"
#include "digits-inl.h"
#include "norm-inl.h"
#include "parallel.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// A task's share of a matrix: some 32 KiB, so that threads end together. Prefetched as far ahead of what is
// read as covers the latency of memory (ffn_row-inl.h); one row where rows are read in order has its own way.
inline constexpr size_t kTaskBytes = size_t{32} << 10, kTaskAheadBytes = size_t{16} << 10;

// How many of `bytes` each, in whole fours, are at most `most`; at least four.
inline size_t Fours(size_t most, size_t bytes) {
  return std::max<size_t>(4, most / std::max<size_t>(1, bytes) / 4 * 4);
}

// y[r, o] = x[r] . w[o] * scales[o] + bias[o] (null: nothing), then ReLU if asked. A row of y has `stride`
// values.
template <class W>
class Product {
 public:
  Product(const void* w, const float* scales, const float* bias, size_t inputs, size_t outputs, size_t stride,
          bool relu, size_t task_bytes = kTaskBytes)
      : w_(static_cast<const W*>(w)),
        scales_(scales),
        bias_(bias),
        inputs_(inputs),
        outputs_(outputs),
        stride_(stride),
        together_(Fours(task_bytes, inputs * sizeof(W))),
        ahead_(Fours(kTaskAheadBytes, inputs * sizeof(W))),
        relu_(relu) {}

  size_t Tasks() const { return (outputs_ + together_ - 1) / together_; }

  // What a thread reads first.
  void Prefetch(size_t task) const {
    const size_t begin = task * together_, end = std::min(outputs_, begin + ahead_);
    PrefetchStep(w_ + begin * inputs_, (end - begin) * inputs_);
  }

  // x and y point to the first of the rows.
  void Run(size_t task, const Activations<W>* x, size_t rows, float* y) const {
    const Activations<W>* listed[kTileRows];
    for (size_t r = 0; r < rows; ++r) listed[r] = x + r;
    const size_t begin = task * together_, end = std::min(outputs_, begin + together_);
    for (size_t o = begin; o < end; o += 4) FourOutputs(o, listed, rows, y);
  }

 private:
  HWY_INLINE void FourOutputs(size_t first, const Activations<W>* const* x, size_t rows, float* y) const {
    const size_t last = outputs_ - 1, here = std::min<size_t>(4, outputs_ - first);
    const size_t ahead =
        rows == 1 && ReadsInOrder<W>(inputs_) ? 4 : ahead_;  // the next four, as DotsInOrder asks
    const W *w[4], *later[4];
    for (size_t c = 0; c < 4; ++c) {
      w[c] = w_ + std::min(first + c, last) * inputs_;
      later[c] = w_ + std::min(first + ahead + c, last) * inputs_;
    }
    bool more = first + ahead <= last;
    float sums[kMostRows * 4];
    ForRowGroups(rows, [&](auto group, size_t r) HWY_ATTR {
      DotRows<group()>(x + r, w, inputs_, more ? later : nullptr, sums, 4);
      more = false;
      for (size_t k = 0; k < group(); ++k) {
        for (size_t c = 0; c < here; ++c) {
          const float value =
              sums[4 * k + c] * scales_[first + c] + (bias_ == nullptr ? 0.0f : bias_[first + c]);
          y[(r + k) * stride_ + first + c] = relu_ && value < 0.0f ? 0.0f : value;  // NaN stays
        }
      }
    });
  }

  const W* w_;
  const float *scales_, *bias_;
  size_t inputs_, outputs_, stride_, together_, ahead_;
  bool relu_;
};

// y of the only row x, which each thread prepares for itself.
template <class W, class P>
void OneRow(const P& product, const OneRowOfX<W>& x, float* y, const Parallel& parallel) {
  parallel.For(product.Tasks(), [&](size_t task) {
    x.Prefetch();
    if (!x.IsReady()) product.Prefetch(task);
    product.Run(task, x.Get(), 1, y);
  });
}

// y [rows, stride] of x [rows, inputs].
template <class W, class P>
void ManyRows(const P& product, const float* x, size_t inputs, size_t rows, float* y, size_t stride,
              CallArena* arena, const Parallel& parallel) {
  const Activations<W>* prepared = PrepareRows<W>(x, rows, inputs, Int4Digits::kThree, arena, parallel);
  const size_t tiles = (rows + kTileRows - 1) / kTileRows, tasks = product.Tasks();
  parallel.For(tiles * tasks, [&](size_t i) {
    const size_t first = i / tasks * kTileRows;
    product.Run(i % tasks, prepared + first, std::min(kTileRows, rows - first), y + first * stride);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
