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
#include "sum_tree.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

template <class W>
void OneHead(const AttentionArgs& a, const Activations<W>* x, size_t h, bool active, Pointer<W> after,
             float* y) {
  Arena& arena = ThreadArena();
  Head<W> head(a, h);
  head.after = after;
  PrefetchStep(head.scales, 4 * a.head_size);
  PrefetchStep(head.bias, 3 * a.head_size);
  float* context = a.context + h * a.head_size;
  CopyPrefix(a, 0, h);
  if (!active) std::fill(context, context + a.head_size, 0.0f);
  if (!active && a.kv_active_only) return;
  float *query = arena.Take<float>(a.head_size), *fresh = arena.Take<float>(a.head_size);
  const size_t slot = SlotOffset(a, 0, h, static_cast<size_t>(a.past[0]));
  if (active) Project(a, head, kQuery, 3, QueryFactor(a), &x, 1, &query);
  Project(a, head, kKey, active ? 2 : 1, 1.0f, &x, 1, &fresh);
  StoreSlot(a, fresh, a.present_key, slot);
  Project(a, head, kValue, active ? 1 : 0, 1.0f, &x, 1, &fresh);
  StoreSlot(a, fresh, a.present_value, slot);
  if (!active) return;
  const uint32_t token = 0;
  Attend(a, 0, h, &token, 1, query, 0, context, &arena);
  const float* context_row = context;
  float* share = arena.Take<float>(a.width);  // not `y` itself, see OneRow of sparse_ffn.cc
  std::fill(share, share + a.width, 0.0f);
  ProjectOut(a, head, &context_row, 1, 0, a.width, &share, arena.Take<float>(a.head_size));
  std::copy(share, share + a.width, y);
}

template <class W>
ReadCount OneRow(const AttentionArgs& a, const Activations<W>* x, CallArena* arena,
                 const Parallel& parallel) {
  uint32_t* masks = arena->Take<uint32_t>(a.heads);
  TileMasks(a.selection, a.tokens, 0, 1, masks);
  ReadCount read;
  for (size_t h = 0; h < a.heads; ++h) read += CountHead<W>(a, masks[h] != 0, !a.kv_active_only);
  float* partial = arena->Take<float>(a.heads * a.width);
  SumTree sums(partial, a.heads, a.width, arena);
  std::atomic<size_t> running{0};
  parallel.For(a.heads, [&](size_t h) {
    const size_t next =
        h + 1 + running.fetch_add(1, std::memory_order_relaxed);  // see OneRow of sparse_ffn.cc
    Pointer<W> after{};
    if (next < a.heads && (masks[next] != 0 || !a.kv_active_only)) {
      const Head<W> head(a, next);
      after = head.w + (masks[next] != 0 ? kQuery : kKey) * head.part_size;
    }
    float* y = partial + h * a.width;
    if (masks[h] == 0) std::fill(y, y + a.width, 0.0f);
    OneHead<W>(a, x, h, masks[h] != 0, after, y);
    sums.Finish(h);
    running.fetch_sub(1, std::memory_order_relaxed);
  });
  WithBias(a.bo, partial, 1, a.width, a.y);
  return read;
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
