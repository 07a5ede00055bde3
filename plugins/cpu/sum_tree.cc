// SPDX-License-Identifier: Apache-2.0
// The sums of sum_tree.h and types.h, once per SIMD target: the same bits at every width.
#include "sum_tree.h"

#include "types.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sum_tree.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::ScalableTag<float>;

// to[i] = f(of loads of i) for i < n, as many at once as a vector holds; load(d, i, p) reads p[i].
template <class F>
HWY_INLINE void Set(float* to, size_t n, const F& f) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(f([&](const float* p) HWY_ATTR { return hn::LoadU(d, p + i); }), d, to + i);
  }
  if (const size_t rest = n - i; rest != 0) {
    hn::StoreN(f([&](const float* p) HWY_ATTR { return hn::LoadN(d, p + i, rest); }), d, to + i, rest);
  }
}

void AddRow(float* to, const float* add, size_t n) {
  Set(to, n, [&](auto load) HWY_ATTR { return hn::Add(load(to), load(add)); });
}

void BiasRow(const float* bias, const float* residual, const float* sum, size_t n, float* y) {
  if (residual == nullptr) {
    Set(y, n, [&](auto load) HWY_ATTR { return hn::Add(load(bias), load(sum)); });
  } else {
    Set(y, n, [&](auto load) HWY_ATTR { return hn::Add(load(residual), hn::Add(load(bias), load(sum))); });
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {
namespace {

HWY_EXPORT(AddRow);
HWY_EXPORT(BiasRow);

}  // namespace

void AddTo(float* to, const float* add, size_t n) { HWY_DYNAMIC_DISPATCH(AddRow)(to, add, n); }

void WithBias(const float* bias, const float* residual, const float* sum, size_t rows, size_t width,
              float* y) {
  for (size_t r = 0; r < rows; ++r, sum += width, y += width) {
    HWY_DYNAMIC_DISPATCH(BiasRow)(bias, residual, sum, width, y);
    if (residual != nullptr) residual += width;
  }
}

}  // namespace shadowc
#endif  // HWY_ONCE
