// SPDX-License-Identifier: Apache-2.0
#include "layer_norm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "layer_norm.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "hwy/highway.h"
#include "norm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

void NormaliseRow(const float* x, const Norm& norm, size_t width, float* y) { Normalise(x, norm, width, y); }

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {

HWY_EXPORT(NormaliseRow);

void LayerNorm(const float* x, const Norm& norm, size_t rows, size_t width, float* y,
               const Parallel& parallel) {
  const auto row = HWY_DYNAMIC_POINTER(NormaliseRow);
  parallel.For(rows, [&](size_t r) { row(x + r * width, norm, width, y + r * width); });
}

}  // namespace shadowc
#endif  // HWY_ONCE
