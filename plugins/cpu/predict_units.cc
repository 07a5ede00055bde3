// SPDX-License-Identifier: Apache-2.0
// Two products over weight rows and a selection in one call, see predict_units.h: as nodes of their own they
// take longer to start than to compute.
#include "predict_units.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "arena.h"
#include "select_threshold.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "predict_units.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "digits-inl.h"
#include "hwy/highway.h"
#include "norm-inl.h"
#include "quads-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {

// One of the two products: y[r, o] = x[r] . w[o] * scales[o] + bias[o], then ReLU if asked. A row of y has
// `stride` values.
template <class W>
class Product {
 public:
  Product(const void* w, const float* scales, const float* bias, size_t inputs, size_t outputs, size_t stride,
          bool relu)
      : w_(static_cast<const W*>(w)),
        scales_(scales),
        bias_(bias),
        inputs_(inputs),
        outputs_(outputs),
        stride_(stride),
        together_(Fours(kTaskBytes, inputs * sizeof(W))),
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
    const W *w[4], *later[4];
    for (size_t c = 0; c < 4; ++c) {
      w[c] = w_ + std::min(first + c, last) * inputs_;
      later[c] = w_ + std::min(first + ahead_ + c, last) * inputs_;
    }
    bool more = first + ahead_ <= last;
    float sums[kMostRows * 4];
    ForRowGroups(rows, [&](auto group, size_t r) HWY_ATTR {
      DotRows<group()>(x + r, w, inputs_, more ? later : nullptr, sums, 4);
      more = false;
      for (size_t k = 0; k < group(); ++k) {
        for (size_t c = 0; c < here; ++c) {
          const float value = sums[4 * k + c] * scales_[first + c] + bias_[first + c];
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
  const Activations<W>* prepared = PrepareRows<W>(x, rows, inputs, arena, parallel);
  const size_t tiles = (rows + kTileRows - 1) / kTileRows, tasks = product.Tasks();
  parallel.For(tiles * tasks, [&](size_t i) {
    const size_t first = i / tasks * kTileRows;
    product.Run(i % tasks, prepared + first, std::min(kTileRows, rows - first), y + first * stride);
  });
}

// The last `each` tokens of each sequence, one after the other.
const float* LastTokens(const PredictArgs& a, size_t each, CallArena* arena) {
  if (each == a.tokens) return a.x;
  float* rows = arena->Take<float>(a.batch * each * a.width);
  for (size_t b = 0; b < a.batch; ++b) {
    const float* from = a.x + ((b + 1) * a.tokens - each) * a.width;
    std::copy(from, from + each * a.width, rows + b * each * a.width);
  }
  return rows;
}

template <class W>
auto SecondOf(const PredictArgs& a, size_t hidden) {
  if constexpr (std::is_same_v<W, int8_t>) {
    return Quads(a, hidden);
  } else {
    return Product<W>(a.w2, a.scales2, a.b2, hidden, a.units, a.units, false);
  }
}

template <class W>
void Score(const PredictArgs& a, size_t each, float* scores, CallArena* arena, const Parallel& parallel) {
  const size_t rows = a.batch * each;
  const size_t hidden = std::is_same_v<W, int8_t> ? hwy::RoundUpTo(a.hidden, 4) : a.hidden;  // then zeros
  const Product<W> first(a.w1, a.scales1, a.b1, a.width, a.hidden, hidden, a.relu);
  const auto second = SecondOf<W>(a, hidden);
  using Between = std::conditional_t<std::is_same_v<W, int8_t>, QuadWeight, W>;
  const float* x = LastTokens(a, each, arena);
  float* between = arena->Take<float>(rows * hidden);
  if (hidden != a.hidden) std::fill_n(between, rows * hidden, 0.0f);
  if (rows == 1) {
    OneRow(first, OneRowOfX<W>(x, a.norm, a.width), between, parallel);
    OneRow(second, OneRowOfX<Between>(between, Norm{}, hidden), scores, parallel);
    return;
  }
  const float* read = NormaliseRows(x, a.norm, rows, a.width, arena, parallel);
  ManyRows<W>(first, read, a.width, rows, between, hidden, arena, parallel);
  ManyRows<Between>(second, between, hidden, rows, scores, a.units, arena, parallel);
}

}  // namespace

void PredictScores(const PredictArgs& a, size_t each, float* scores, CallArena* arena,
                   const Parallel& parallel) {
  if (a.type == WeightType::kInt8) {
    Score<int8_t>(a, each, scores, arena, parallel);
  } else {
    Score<float>(a, each, scores, arena, parallel);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {
namespace {

HWY_EXPORT(PredictScores);

float DensityOf(const PredictArgs& a, size_t batch) {
  return a.density[(a.density_batch == 1 ? 0 : batch) * a.densities + a.column];
}

void Compare(const PredictArgs& a) {
  for (size_t row = 0; row < a.batch * a.tail; ++row) {
    const float threshold = DensityOf(a, row / a.tail), *scores = a.scores + row * a.units;
    a.threshold[row] = threshold;
    a.active[row] = static_cast<int32_t>(
        std::count_if(scores, scores + a.units, [=](float score) { return !(score < threshold); }));
  }
}

void Rank(const PredictArgs& a, CallArena* arena, const Parallel& parallel) {
  float* density = arena->Take<float>(a.batch);
  for (size_t b = 0; b < a.batch; ++b) density[b] = DensityOf(a, b);
  SelectArgs select{};
  select.scores = a.scores;
  select.density = density;
  select.batch = select.density_count = a.batch;
  select.tail = a.tail;
  select.layers = 1;
  select.units = a.units;
  select.exempt = {static_cast<uint8_t>(a.exempt)};
  select.min_active = a.min_active;
  select.threshold = a.threshold;
  select.active = a.active;
  SelectThreshold(select, parallel);
}

}  // namespace

void PredictUnits(const PredictArgs& a, const Parallel& parallel) {
  const size_t each = std::max<size_t>(a.tail, 1);
  float* scores = a.tail != 0 ? a.scores : a.last;
  if (a.batch == 0 || scores == nullptr) return;
  CallArena arena;
  HWY_DYNAMIC_DISPATCH(PredictScores)(a, each, scores, &arena, parallel);
  if (a.tail == 0) return;
  for (size_t b = 0; a.last != nullptr && b < a.batch; ++b) {
    const float* from = scores + ((b + 1) * each - 1) * a.units;
    std::copy(from, from + a.units, a.last + b * a.units);
  }
  if (a.is_threshold) {
    Compare(a);
  } else {
    Rank(a, &arena, parallel);
  }
}

}  // namespace shadowc
#endif  // HWY_ONCE
