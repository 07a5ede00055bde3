// SPDX-License-Identifier: Apache-2.0
// The layer norm in front of an operator, once per SIMD target.

#if defined(SHADOWC_CPU_NORM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_NORM_INL_H_
#undef SHADOWC_CPU_NORM_INL_H_
#else
#define SHADOWC_CPU_NORM_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <new>

#include "arena.h"
#include "digits-inl.h"
#include "int4-inl.h"
#include "parallel.h"
#include "rows-inl.h"
#include "types.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// Sum of f(x[i]) over i < n, in an order that depends on n alone.
template <class F>
HWY_INLINE float SumOf(const float* x, size_t n, F&& f) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  VF a = hn::Zero(df), b = a, c = a, d = a;
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = hn::Add(a, f(hn::LoadU(df, x + i)));
    b = hn::Add(b, f(hn::LoadU(df, x + i + lanes)));
    c = hn::Add(c, f(hn::LoadU(df, x + i + 2 * lanes)));
    d = hn::Add(d, f(hn::LoadU(df, x + i + 3 * lanes)));
  }
  for (; i + lanes <= n; i += lanes) a = hn::Add(a, f(hn::LoadU(df, x + i)));
  if (i < n) b = hn::Add(b, hn::IfThenElseZero(hn::FirstN(df, n - i), f(hn::LoadN(df, x + i, n - i))));
  return hn::ReduceSum(df, hn::Add(hn::Add(a, b), hn::Add(c, d)));
}

// to = (x - mean) / sqrt(variance + epsilon) * scale + bias. The variance is summed from differences: with
// squares alone, nothing would be left of it where the mean is large.
HWY_INLINE void Normalise(const float* x, const Norm& norm, size_t n, float* to) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  const float count = static_cast<float>(n);
  // Captured as floats: SVE vectors cannot be.
  const float mean = SumOf(x, n, [](VF v) HWY_ATTR { return v; }) / count;
  const auto square = [=](VF v) HWY_ATTR {
    const VF difference = hn::Sub(v, hn::Set(df, mean));
    return hn::Mul(difference, difference);
  };
  const float factor = 1.0f / std::sqrt(SumOf(x, n, square) / count + norm.epsilon);
  const auto value = [=](VF v, VF scale, VF bias) HWY_ATTR {
    return hn::MulAdd(hn::Mul(hn::Sub(v, hn::Set(df, mean)), hn::Set(df, factor)), scale, bias);
  };
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VF y = value(hn::LoadU(df, x + i), hn::LoadU(df, norm.scale + i), hn::LoadU(df, norm.bias + i));
    hn::StoreU(y, df, to + i);
  }
  if (const size_t m = n - i; m != 0) {
    const VF y =
        value(hn::LoadN(df, x + i, m), hn::LoadN(df, norm.scale + i, m), hn::LoadN(df, norm.bias + i, m));
    hn::StoreN(y, df, to + i, m);
  }
}

// What many rows of x [rows, n] are read as: x itself without a norm.
inline const float* NormaliseRows(const float* x, const Norm& norm, size_t rows, size_t n, CallArena* arena,
                                  const Parallel& parallel) {
  constexpr size_t kAtOnce = 4;
  if (norm.scale == nullptr) return x;
  float* to = arena->Take<float>(rows * n);
  parallel.For((rows + kAtOnce - 1) / kAtOnce, [&](size_t task) {
    for (size_t r = task * kAtOnce; r < std::min(rows, (task + 1) * kAtOnce); ++r)
      Normalise(x + r * n, norm, n, to + r * n);
  });
  return to;
}

// The only row of a call, normalised and prepared by each thread that needs it: from another thread it would
// have to come out of that thread's cache, and the first weights are on their way meanwhile.
template <class W>
class OneRowOfX {
 public:
  OneRowOfX(const float* x, const Norm& norm, size_t n, Int4Digits digits = Int4Digits::kThree)
      : x_(x), norm_(norm), n_(n), digits_(digits) {}

  // Whether this thread has prepared it.
  bool IsReady() const { return call_.Has(); }

  // What Get will read, in front of the first weights: behind them it would have to wait for all of them.
  void Prefetch() const {
    if (IsReady()) return;
    PrefetchStep(x_, n_);
    if (norm_.scale == nullptr) return;
    PrefetchStep(norm_.scale, n_);
    PrefetchStep(norm_.bias, n_);
  }

  const Activations<W>* Get() const {
    return call_.template Once<Activations<W>>([&](Arena* arena) {
      const float* row = x_;
      if (norm_.scale != nullptr) {
        float* normalised = arena->Take<float>(n_);
        Normalise(x_, norm_, n_, normalised);
        row = normalised;
      }
      auto* prepared = new (arena->Take<Activations<W>>(1)) Activations<W>;
      prepared->Prepare(row, n_, arena->Take<int8_t>(Activations<W>::Bytes(n_)), digits_);
      return prepared;
    });
  }

 private:
  const float* x_;
  Norm norm_;
  size_t n_;
  Int4Digits digits_;
  PerThread call_;
};

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
