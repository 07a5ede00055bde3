// SPDX-License-Identifier: Apache-2.0
#include "sparse_attention.h"

#include <algorithm>

#include "arena.h"
#include "attention_panels.h"
#include "panel_rows.h"
#include "sum_tree.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sparse_attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "attention_head-inl.h"
#include "attention_row-inl.h"
#include "digits-inl.h"
#include "hwy/highway.h"
#include "norm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {

// ---- several rows: projections by tile and head, attention, output projection by tile

// Tiles of at most kTileRows rows: which of them use each head.
struct Tiling {
  size_t rows, tiles, heads;
  const uint32_t* masks;            // [tiles, heads]
  const uint8_t* wanted = nullptr;  // [rows] those that `masks` has anything of; null: all
  size_t First(size_t t) const { return t * kTileRows; }
  size_t Count(size_t t) const { return std::min(kTileRows, rows - First(t)); }
};

// Row numbers within the tile, ascending.
HWY_INLINE size_t RowsOf(uint32_t bits, uint32_t* list) {
  size_t count = 0;
  for (uint32_t r = 0; bits != 0; ++r, bits >>= 1) {
    if ((bits & 1) != 0) list[count++] = r;
  }
  return count;
}

template <class W>
void ProjectTile(const AttentionArgs& a, const Activations<W>* rows, const Tiling& tiling, size_t t, size_t h,
                 float* query) {
  const Head<W> head(a, h);
  const uint32_t active = tiling.masks[t * a.heads + h];
  const size_t all_rows = tiling.Count(t);
  uint32_t all = all_rows == 32 ? ~0u : (1u << all_rows) - 1;
  KeepRows(tiling.wanted, tiling.First(t), all_rows, &all, 1);
  // Keys, then values, of the rows in hand, before they are stored.
  float* fresh = ThreadArena().Take<float>(kTileRows * a.head_size);
  // target(row, i): where the result of the i-th row in hand goes.
  const auto project = [&](Part part, uint32_t bits, size_t following, float factor, auto target) HWY_ATTR {
    uint32_t list[kTileRows];
    const Activations<W>* x[kTileRows];
    float* out[kTileRows];
    const size_t count = RowsOf(bits, list);
    for (size_t i = 0; i < count; ++i) {
      const size_t row = tiling.First(t) + list[i];
      x[i] = rows + row;
      out[i] = target(row, i);
    }
    if (count != 0) Project(a, head, part, following, factor, x, count, out);
  };
  const uint32_t key_value = a.kv_active_only ? active : all;
  const auto project_to = [&](void* cache, Part part, size_t following) HWY_ATTR {
    project(part, key_value, following, 1.0f, [&](size_t, size_t i) { return fresh + i * a.head_size; });
    uint32_t list[kTileRows];
    const size_t count = RowsOf(key_value, list);
    for (size_t i = 0; i < count; ++i) {
      const size_t row = tiling.First(t) + list[i], batch = row / a.tokens;
      const size_t slot = static_cast<size_t>(a.past[batch]) + row % a.tokens;
      StoreSlot(a, fresh + i * a.head_size, cache, SlotOffset(a, batch, h, slot));
    }
  };
  project(kQuery, active, 2, QueryFactor(a),
          [&](size_t row, size_t) { return query + row * a.width + h * a.head_size; });
  project_to(a.present_key, kKey, 1);
  project_to(a.present_value, kValue, 0);
}

// One batch entry, head and run of kTileRows tokens.
void AttendTokens(const AttentionArgs& a, const Tiling& tiling, size_t batch, size_t h, size_t first,
                  const float* query) {
  uint32_t token[kTileRows];
  size_t count = 0;
  const size_t row0 = batch * a.tokens, column = h * a.head_size;
  for (size_t s = first; s < std::min(a.tokens, first + kTileRows); ++s) {
    const size_t row = row0 + s;
    if ((tiling.masks[row / kTileRows * a.heads + h] >> row % kTileRows & 1) != 0) {
      token[count++] = static_cast<uint32_t>(s);
    } else {
      float* context = a.context + row * a.width + column;
      std::fill(context, context + a.head_size, 0.0f);
    }
  }
  const size_t origin = row0 * a.width + column;
  Attend(a, batch, h, token, count, query + origin, a.width, a.context + origin, &ThreadArena());
}

// Sets y [rows of the tile, end - begin] to the head's share of these columns.
template <class W>
void ProjectOutHead(const AttentionArgs& a, const Tiling& tiling, size_t t, size_t h, size_t begin,
                    size_t end, float* y, float* scratch) {
  uint32_t list[kTileRows];
  const float* context[kTileRows];
  float* out[kTileRows];
  const size_t count = RowsOf(tiling.masks[t * a.heads + h], list), columns = end - begin;
  std::fill(y, y + tiling.Count(t) * columns, 0.0f);
  for (size_t i = 0; i < count; ++i) {
    context[i] = a.context + (tiling.First(t) + list[i]) * a.width + h * a.head_size;
    out[i] = y + list[i] * columns;
  }
  if (count != 0) ProjectOut(a, Head<W>(a, h), context, count, begin, end, out, scratch);
}

// y = bo + the shares of the heads, added up as for one row. A task is one tile and a range of columns.
template <class W>
void ProjectOutRows(const AttentionArgs& a, const Tiling& tiling, const Parallel& parallel) {
  constexpr size_t kColumns = 512;
  const size_t ranges = (a.width + kColumns - 1) / kColumns;
  parallel.For(tiling.tiles * ranges, [&](size_t task) {
    const size_t t = task / ranges, begin = task % ranges * kColumns,
                 end = std::min(a.width, begin + kColumns);
    const size_t columns = end - begin, size = tiling.Count(t) * columns;
    Arena& memory = ThreadArena();
    float* sum = memory.Take<float>((1 + SumDepth(a.heads)) * size);
    float* scratch = memory.Take<float>(kTileRows * a.head_size);
    SumInOrder(0, TreeWidth(a.heads), a.heads, size, sum, sum + size, AllLeaves(),
               [&](size_t h, float* y) { ProjectOutHead<W>(a, tiling, t, h, begin, end, y, scratch); });
    for (size_t r = 0; r < tiling.Count(t); ++r) {
      const size_t at = (tiling.First(t) + r) * a.width + begin;
      const float* residual = a.residual == nullptr ? nullptr : a.residual + at;
      WithBias(a.bo + begin, residual, sum + r * columns, 1, columns, a.y + at);
    }
  });
}

// Of the wanted rows alone.
Tiling OnlyRows(const uint8_t* wanted, const Tiling& all, CallArena* arena) {
  uint32_t* masks = arena->Take<uint32_t>(all.tiles * all.heads);
  std::copy_n(all.masks, all.tiles * all.heads, masks);
  for (size_t t = 0; t < all.tiles; ++t)
    KeepRows(wanted, all.First(t), all.Count(t), masks + t * all.heads, all.heads);
  return {all.rows, all.tiles, all.heads, masks, wanted};
}

template <class W>
ReadCount ManyRows(const AttentionArgs& a, CallArena* arena, const Parallel& parallel) {
  const size_t rows = a.batch * a.tokens, tiles = (rows + kTileRows - 1) / kTileRows;
  uint32_t* masks = arena->Take<uint32_t>(tiles * a.heads);
  const Tiling tiling{rows, tiles, a.heads, masks};
  ReadCount read;
  for (size_t t = 0; t < tiles; ++t) {
    uint32_t* mine = masks + t * a.heads;
    TileMasks(a.selection, a.tokens, tiling.First(t), tiling.Count(t), mine);
    for (size_t h = 0; h < a.heads; ++h) read += CountHead<W>(a, mine[h] != 0, !a.kv_active_only);
  }
  const PanelKernels* kernels = KernelsFor(a.type, a.rounding, rows, a.width, 4 * a.width * a.width);
  float* query = arena->Take<float>(rows * a.width);
  if (a.present_key != a.past_key || a.present_value != a.past_value) {
    parallel.For(a.batch * a.heads, [&](size_t i) { CopyPrefix(a, i / a.heads, i % a.heads); });
  }
  // In the general way the rows that need it, and in panels the others.
  uint8_t* left = arena->Take<uint8_t>(rows + kPanelRows);
  Panels panels{};
  if (kernels != nullptr) panels = TakePanels(*kernels, arena, PanelsOf(rows), a.width, a.rounding);
  if (kernels == nullptr || SplitForProjection(*kernels, a, panels, left, parallel)) {
    const Activations<W>* x = PrepareRows<W>(a.x, rows, a.width, a.int4_digits, arena, parallel);
    const Tiling general = kernels == nullptr ? tiling : OnlyRows(left, tiling, arena);
    parallel.For(tiles * a.heads,
                 [&](size_t i) { ProjectTile<W>(a, x, general, i % tiles, i / tiles, query); });
  }
  if (kernels != nullptr) {
    ProjectPanels(*kernels, a, masks, panels, left, QueryFactor(a), query, parallel);
  }
  const size_t runs = (a.tokens + kTileRows - 1) / kTileRows;
  parallel.For(a.batch * a.heads * runs, [&](size_t i) {
    // Late tokens see most: they go first, so that no long task is left for the end.
    const size_t run = runs - 1 - i / (a.batch * a.heads), pair = i % (a.batch * a.heads);
    AttendTokens(a, tiling, pair / a.heads, pair % a.heads, run * kTileRows, query);
  });
  if (kernels == nullptr) {
    ProjectOutRows<W>(a, tiling, parallel);
  } else if (!ProjectOutPanels(*kernels, a, masks, arena, left, parallel)) {
    AttentionArgs again = a;
    again.y = arena->Take<float>(rows * a.width);
    ProjectOutRows<W>(again, OnlyRows(left, tiling, arena), parallel);
    for (size_t r = 0; r < rows; ++r) {
      if (left[r] != 0) std::copy(again.y + r * a.width, again.y + (r + 1) * a.width, a.y + r * a.width);
    }
  }
  return read;
}

template <class W>
ReadCount Run(const AttentionArgs& given, const Parallel& parallel) {
  AttentionArgs a = given;
  a.residual = a.norm.scale == nullptr ? nullptr : a.x;
  const size_t rows = a.batch * a.tokens;
  if (rows == 0) {
    for (size_t i = 0; i < a.batch * a.heads; ++i) CopyPrefix(a, i / a.heads, i % a.heads);
    return {};
  }
  CallArena arena;
  if (rows == 1) return OneRow<W>(a, &arena, parallel);
  a.x = NormaliseRows(a.x, a.norm, rows, a.width, &arena, parallel);
  return ManyRows<W>(a, &arena, parallel);
}

}  // namespace

ReadCount SparseAttention(const AttentionArgs& args, const Parallel& parallel) {
  ReadCount read;
  DispatchWeights(args.type, [&](auto type) {
    read = Run<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>(args, parallel);
  });
  return read;
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {

HWY_EXPORT(SparseAttention);

ReadCount SparseAttention(const AttentionArgs& args, const Parallel& parallel) {
  return HWY_DYNAMIC_DISPATCH(SparseAttention)(args, parallel);
}

}  // namespace shadowc
#endif  // HWY_ONCE
