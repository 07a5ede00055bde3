// SPDX-License-Identifier: Apache-2.0
// How later rows of int4 are fetched while others are read, once per SIMD target.

#if defined(SHADOWC_CPU_INT4_FETCH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_INT4_FETCH_INL_H_
#undef SHADOWC_CPU_INT4_FETCH_INL_H_
#else
#define SHADOWC_CPU_INT4_FETCH_INL_H_
#endif

#include <algorithm>
#include <cstddef>

#include "digits-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// Rows of int4 that are added together; callers that want the same bits with some rows of zeros left out must
// leave the others where they are. On an Intel core 16 take less time than 8; on Zen 4 0.99 of it
// from L2, and 1.01 from memory.
inline constexpr size_t kInt4Rows = SHADOWC_DIGITS && HWY_TARGET != HWY_AVX3_ZEN4 ? 16 : 8;

// Fetches the later rows' bytes of groups g and g + 1, and their scales with the first group. In fewer rounds
// than PrefetchRows on Zen 4: these kernels are bound by instructions. There two rounds take 1.01 to 1.02 of
// the time of three (a dense FFN from memory), one 1.05 and 1.06, none 1.65. On an Intel core with VNNI one
// round in place of three takes 0.77 to 0.99 of a call's time (of twelve measured one took 1.18), none 1.1
// to 1.9. With AVX2 (forced, on Zen 4) tokens take 0.92 to 0.98 of their time with two in place of three.
template <class Row>
HWY_INLINE void PrefetchGroups(Row later, size_t count, size_t g, size_t groups) {
  constexpr size_t kRounds = HWY_TARGET == HWY_AVX3_ZEN4 ? 3 : SHADOWC_PAIRS ? 2 : 1;
  InRounds<kRounds>(count, [=](size_t c) HWY_ATTR { PrefetchL2(later(c).pairs + g * (kInt4Group / 2)); });
  for (size_t c = 0; g == 0 && c < count; ++c) {
    for (size_t s = 0; s < groups; s += kLine / sizeof(float)) PrefetchL2(later(c).scales + s);
  }
}

// The same of row c alone, where kPrefetchOneByOne. Eight rows fetch their scales in eight different steps.
HWY_INLINE void PrefetchGroupsOf(Int4Pointer row, size_t c, size_t g, size_t groups) {
  const size_t step = g / 2, steps = (groups + 1) / 2;
  PrefetchL2(row.pairs + g * (kInt4Group / 2));
  if (step == std::min(step / 8 * 8 + c % 8, steps - 1)) PrefetchL2(row.scales + step / 8 * 16);
}

// The four rows of `later` (null: nothing), while as many are read.
struct GroupFetch {
  const Int4Pointer* later;
  size_t groups;

  struct Step {
    const Int4Pointer* later;
    size_t g, groups;
    HWY_INLINE void operator()(size_t c) const {
      if (kPrefetchOneByOne && later != nullptr) PrefetchGroupsOf(later[c], c, g, groups);
    }
  };
  HWY_INLINE Step At(size_t g) const {
    const Int4Pointer* rows = later;
    if (!kPrefetchOneByOne && later != nullptr)
      PrefetchGroups([=](size_t c) HWY_ATTR { return rows[c]; }, 4, g, groups);
    return {rows, g, groups};
  }
};

// The `count` rows of `later`, while `here` are read.
template <class Later>
struct RowsFetch {
  Later later;
  size_t count, groups;
  bool one_by_one;  // as many follow as are read

  struct Step {
    const RowsFetch* all;
    size_t g;
    HWY_INLINE void operator()(size_t c) const {
      if (all->one_by_one) PrefetchGroupsOf(all->later(c), c, g, all->groups);
    }
  };
  RowsFetch(Later rows, size_t later_count, size_t here, size_t group_count)
      : later(rows),
        count(later_count),
        groups(group_count),
        one_by_one(kPrefetchOneByOne && later_count == kInt4Rows && here + 4 > kInt4Rows) {}
  HWY_INLINE Step At(size_t g) const {
    if (!one_by_one) PrefetchGroups(later, count, g, groups);
    return {this, g};
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
