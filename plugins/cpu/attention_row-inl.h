// SPDX-License-Identifier: Apache-2.0
// One row of SparseAttention: the decode path, bound by memory bandwidth. Once per SIMD target.

#if defined(SHADOWC_CPU_ATTENTION_ROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_ATTENTION_ROW_INL_H_
#undef SHADOWC_CPU_ATTENTION_ROW_INL_H_
#else
#define SHADOWC_CPU_ATTENTION_ROW_INL_H_
#endif

#include <algorithm>

#include "attention_head-inl.h"
#include "digits-inl.h"
#include "norm-inl.h"
#include "sum_tree.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// The first rows of a record that nothing has fetched.
template <class W>
HWY_INLINE void PrefetchStart(const AttentionArgs& a, const Head<W>& head, Part part) {
  const size_t rows =
      std::min(a.head_size, std::max<size_t>(4, kAheadBytes / (RowElements<W>(a.width) * sizeof(W))));
  const Pointer<W> w = head.w + part * head.part_size;
  for (size_t d = 0; d < rows; ++d) PrefetchStep(w + d * a.width, a.width);
}

// Sets y to the head's share if it is active, and writes its context, key and value.
template <class W>
void OneHead(const AttentionArgs& a, const OneRowOfX<W>& row, size_t h, bool active, Pointer<W> after,
             float* y, Arena* arena) {
  Head<W> head(a, h);
  head.after = after;
  PrefetchStep(head.scales, 4 * a.head_size);
  PrefetchStep(head.bias, 3 * a.head_size);
  if (active) PrefetchCache(a, h);
  float* context = a.context + h * a.head_size;
  CopyPrefix(a, 0, h);
  if (!active) std::fill(context, context + a.head_size, 0.0f);
  if (!active && a.kv_active_only) return;
  float *query = arena->Take<float>(a.head_size), *fresh = arena->Take<float>(a.head_size);
  const size_t slot = SlotOffset(a, 0, h, static_cast<size_t>(a.past[0]));
  if (!row.IsReady()) {
    row.Prefetch();
    PrefetchStart(a, head, active ? kQuery : kKey);
  }
  const Activations<W>* x = row.Get();
  if (active) Project(a, head, kQuery, 3, QueryFactor(a), &x, 1, &query);
  Project(a, head, kKey, active ? 2 : 1, 1.0f, &x, 1, &fresh);
  StoreSlot(a, fresh, a.present_key, slot);
  Project(a, head, kValue, active ? 1 : 0, 1.0f, &x, 1, &fresh);
  StoreSlot(a, fresh, a.present_value, slot);
  if (!active) return;
  if (ReadsInOrder<W>(a.width)) {
    // Of the eight rows that are added first, the last values' products have fetched four.
    const Pointer<W> out = head.w + kOut * head.part_size;
    for (size_t d = 4; d < std::min<size_t>(8, a.head_size); ++d)
      PrefetchStep(out + d * a.width, a.width / 2);
  }
  std::fill(y, y + a.width, 0.0f);  // while the first of these rows are on their way
  const uint32_t token = 0;
  Attend(a, 0, h, &token, 1, query, 0, context, arena);
  const float* context_row = context;
  ProjectOut(a, head, &context_row, 1, 0, a.width, &y, arena->Take<float>(a.head_size));
}

// Of the heads in front of each of them, and of all.
struct HeadsBefore {
  uint32_t *active, *work;  // [H + 1]; work: parts of records that are read

  HeadsBefore(const AttentionArgs& a, const uint32_t* masks, CallArena* arena)
      : active(arena->Take<uint32_t>(a.heads + 1)), work(arena->Take<uint32_t>(a.heads + 1)) {
    active[0] = work[0] = 0;
    for (size_t h = 0; h < a.heads; ++h) {
      const bool is_active = masks[h] != 0;
      active[h + 1] = active[h] + (is_active ? 1 : 0);
      work[h + 1] = work[h] + (is_active ? 4 : a.kv_active_only ? 0 : 2);
    }
  }
};

template <class W>
ReadCount OneRow(const AttentionArgs& a, CallArena* arena, const Parallel& parallel) {
  const OneRowOfX<W> x(a.x, a.norm, a.width, a.int4_digits);
  uint32_t* masks = arena->Take<uint32_t>(a.heads);
  TileMasks(a.selection, a.tokens, 0, 1, masks);
  ReadCount read;
  for (size_t h = 0; h < a.heads; ++h) read += CountHead<W>(a, masks[h] != 0, !a.kv_active_only);
  const HeadsBefore before(a, masks, arena);
  const auto any = [=](size_t first, size_t last) { return before.active[first] != before.active[last]; };
  const auto is_read = [&](size_t h) { return before.work[h] != before.work[h + 1]; };
  SumTree tree(a.heads, a.width, arena);
  const SumRuns runs(a.heads, parallel.LikelyThreads(), before.work, arena);
  const SumRuns::Sums sums(runs, a.width, arena);
  parallel.For(runs.Count(), [&](size_t r) {
    const auto [first, leaves, after] = runs[r];
    if (leaves == 0) return;
    Arena& memory = ThreadArena();
    float* below = memory.Take<float>(SumDepth(leaves) * a.width);
    SumInOrder(first, leaves, a.heads, a.width, sums[r], below, any, [&](size_t h, float* y) {
      size_t next = h + 1 < first + leaves ? h + 1 : after;
      while (next < a.heads && !is_read(next)) ++next;
      Pointer<W> start{};
      if (next < a.heads) {
        const Head<W> head(a, next);
        start = head.w + (masks[next] != 0 ? kQuery : kKey) * head.part_size;
      }
      OneHead<W>(a, x, h, masks[h] != 0, start, y, &memory);
    });
    tree.Finish(first, leaves, sums[r], any);
  });
  if (any(0, a.heads)) {
    WithBias(a.bo, a.residual, tree.Sum(), 1, a.width, a.y);
  } else {
    std::fill(sums[0], sums[0] + a.width, 0.0f);
    WithBias(a.bo, a.residual, sums[0], 1, a.width, a.y);
  }
  return read;
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
