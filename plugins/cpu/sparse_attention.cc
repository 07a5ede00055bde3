// SPDX-License-Identifier: Apache-2.0
#include "sparse_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "arena.h"
#include "attention_panels.h"
#include "panel_rows.h"
#include "sum_tree.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sparse_attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "attention_core-inl.h"
#include "digits-inl.h"
#include "hwy/highway.h"
#include "int4-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {

enum Part : size_t { kQuery, kKey, kValue, kOut };

// The four parts of one head's record.
template <class W>
struct Head {
  Head(const AttentionArgs& a, size_t h)
      : part_size(a.head_size * a.width),
        w(PointerOf<W>(a.w, a.scales) + h * 4 * part_size),
        scales(a.scales + h * 4 * a.head_size),
        bias(a.bqkv + h * 3 * a.head_size) {}
  // What is read after this record, to prefetch it as this one ends; the last row of this one if nothing is
  // known.
  Pointer<W> after{};
  size_t part_size;
  Pointer<W> w;
  const float* scales;  // of the record rows; not for int4, whose pointers have them
  const float* bias;
};

// out[r][d] = (x[r] . row d of the part * scale + bias) * factor, kColumns values of d at a time. The rows of
// the record that follow are prefetched as these are read, kAhead bytes before they are needed; `following`
// parts are read after this one.
template <size_t kColumns, class W>
HWY_INLINE void ProjectColumns(const AttentionArgs& a, const Head<W>& head, Part part, size_t following,
                               float factor, const Activations<W>* const* x, size_t count,
                               float* const* out) {
  constexpr size_t kAhead = size_t{16} << 10;
  const size_t d_end = a.head_size, width = a.width;
  const size_t ahead_rows = std::max(kColumns, kAhead / (RowElements<W>(width) * sizeof(W)));
  const Pointer<W> w = head.w + part * head.part_size;
  const size_t last = (following + 1) * d_end - 1;  // row of the last part that will be read
  const float *scales = head.scales + part * d_end, *bias = head.bias + part * d_end;
  for (size_t d = 0; d < d_end; d += kColumns) {
    const size_t here = std::min(kColumns, d_end - d);
    Pointer<W> rows[kColumns], ahead[kColumns];
    for (size_t c = 0; c < kColumns; ++c) {
      rows[c] = w + (d + std::min(c, here - 1)) * width;
      const size_t row = d + ahead_rows + c;
      ahead[c] = row <= last             ? w + row * width
                 : head.after == nullptr ? w + last * width
                                         : head.after + (row - last - 1) * width;
    }
    const Pointer<W>* later = ahead;
    float dots[kTileRows * kColumns];
    ForRowGroups(count, [&](auto group, size_t r) HWY_ATTR {
      DotRows<group(), kColumns>(x + r, rows, width, later, dots + r * kColumns, kColumns);
      later = nullptr;
    });
    for (size_t r = 0; r < count; ++r) {
      for (size_t c = 0; c < here; ++c)
        out[r][d + c] = (dots[r * kColumns + c] * RowScale<W>(scales, d + c) + bias[d + c]) * factor;
    }
  }
}

template <class W>
HWY_INLINE void Project(const AttentionArgs& a, const Head<W>& head, Part part, size_t following,
                        float factor, const Activations<W>* const* x, size_t count, float* const* out) {
  // One stream is what the hardware's own prefetchers like best; digits are quick enough for it (see
  // sparse_ffn.cc).
  if constexpr (Activations<W>::kDigits) {
    if (count == 1 && x[0]->Exact())
      return ProjectColumns<1>(a, head, part, following, factor, x, count, out);
  }
  ProjectColumns<4>(a, head, part, following, factor, x, count, out);
}

// y[r][begin ... end) += context[r] (head_size values) times these columns of the head's output rows.
template <class W>
HWY_INLINE void ProjectOut(const AttentionArgs& a, const Head<W>& head, const float* const* context,
                           size_t count, size_t begin, size_t end, float* const* y, float* h) {
  constexpr size_t kRowsAtOnce = 8;
  const Pointer<W> w = head.w + kOut * head.part_size + begin;
  const float* scales = head.scales + kOut * a.head_size;
  for (size_t r = 0; r < count; ++r) {
    for (size_t d = 0; d < a.head_size; ++d) h[r * a.head_size + d] = context[r][d] * RowScale<W>(scales, d);
  }
  for (size_t d = 0; d < a.head_size; d += kRowsAtOnce) {
    const size_t rows = std::min(kRowsAtOnce, a.head_size - d);
    const bool last = d + kRowsAtOnce >= a.head_size;
    const Strided<W> here{w + d * a.width, a.width};
    const Strided<W> ahead{last ? head.after : w + (d + kRowsAtOnce) * a.width, a.width};
    size_t later = !last                   ? std::min(kRowsAtOnce, a.head_size - d - kRowsAtOnce)
                   : head.after == nullptr ? 0
                                           : kRowsAtOnce;
    ForRowGroups(count, [&](auto group, size_t r) HWY_ATTR {
      AxpyRows<group()>(y + r, here, rows, h + r * a.head_size + d, a.head_size, end - begin, later, ahead);
      later = 0;
    });
  }
}

template <class W>
ReadCount CountHead(const AttentionArgs& a, bool active, bool key_value) {
  if (!active && !key_value) return {};
  const size_t parts = active ? 4 : 2;
  return {1, static_cast<int64_t>(parts * a.head_size * RowBytes<W>(a.width))};
}

HWY_INLINE float QueryFactor(const AttentionArgs& a) {
  return 1.0f / std::sqrt(static_cast<float>(a.head_size));
}

// Of a slot of one (row, head), in elements of the cache.
HWY_INLINE size_t SlotOffset(const AttentionArgs& a, size_t batch, size_t head, size_t slot) {
  return ((batch * a.heads + head) * a.capacity + slot) * a.head_size;
}

// Calls f with a null pointer of the cache's element type.
template <class F>
HWY_INLINE void DispatchCache(const AttentionArgs& a, F&& f) {
  if (a.cache == CacheType::kFloat16) {
    f(static_cast<hwy::float16_t*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// Writes the key or value of one token to its slot.
HWY_INLINE void StoreSlot(const AttentionArgs& a, const float* from, void* cache, size_t offset) {
  DispatchCache(a, [&](auto* type) HWY_ATTR {
    StoreNarrow(from, static_cast<decltype(type)>(cache) + offset, a.head_size);
  });
}

// Copies the filled prefix of one (row, head) when the caller did not bind one buffer as past and present.
void CopyPrefix(const AttentionArgs& a, size_t batch, size_t head) {
  const size_t slots = static_cast<size_t>(a.past[batch]) + (a.kv_active_only ? a.tokens : 0);
  const size_t element = BytesOf(a.cache), offset = SlotOffset(a, batch, head, 0) * element;
  const size_t bytes = slots * a.head_size * element;
  if (bytes == 0) return;
  const auto copy = [=](void* to, const void* from) {
    if (to != from)
      std::memcpy(static_cast<char*>(to) + offset, static_cast<const char*>(from) + offset, bytes);
  };
  copy(a.present_key, a.past_key);
  copy(a.present_value, a.past_value);
}

// Attention of the rows `token[0 ... count)` (ascending, at most kTileRows) of one (batch, head). query and
// context point to the values of token 0 with row stride `query_stride` and E.
void Attend(const AttentionArgs& a, size_t batch, size_t head, const uint32_t* token, size_t count,
            const float* query, size_t query_stride, float* context, Arena* arena) {
  const size_t start = static_cast<size_t>(a.start[batch]), past = static_cast<size_t>(a.past[batch]);
  const float* queries[kTileRows];
  float* contexts[kTileRows];
  size_t sees[kTileRows], seeing = 0;
  for (size_t i = 0; i < count; ++i) {
    float* out = context + token[i] * a.width;
    if (past + token[i] < start) {
      std::fill(out, out + a.head_size, 0.0f);
      continue;
    }
    queries[seeing] = query + token[i] * query_stride;
    contexts[seeing] = out;
    sees[seeing++] = past + token[i] + 1 - start;
  }
  if (seeing == 0) return;
  const size_t stride = (sees[seeing - 1] + 3) / 4 * 4;
  const size_t offset = SlotOffset(a, batch, head, start);
  float* logits = arena->Take<float>(seeing * stride);
  DispatchCache(a, [&](const auto* type) HWY_ATTR {
    AttendTile(queries, sees, seeing, static_cast<decltype(type)>(a.present_key) + offset,
               static_cast<decltype(type)>(a.present_value) + offset, a.head_size, contexts, logits, stride);
  });
}

// ---- one row: each head is one task from its queries to its share of y

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

// ---- several rows: projections by tile and head, attention, output projection by tile

// One tile of at most kTileRows rows: which of them use each head.
struct Tiling {
  size_t rows, tiles, heads;
  const uint32_t* masks;  // [tiles, heads]
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
  const uint32_t all = all_rows == 32 ? ~0u : (1u << all_rows) - 1;
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
    float* sum = memory.Take<float>(SumDepth(a.heads) * size);
    float* scratch = memory.Take<float>(kTileRows * a.head_size);
    SumInOrder(0, TreeWidth(a.heads), a.heads, size, sum,
               [&](size_t h, float* y) { ProjectOutHead<W>(a, tiling, t, h, begin, end, y, scratch); });
    for (size_t r = 0; r < tiling.Count(t); ++r) {
      WithBias(a.bo + begin, sum + r * columns, 1, columns, a.y + (tiling.First(t) + r) * a.width + begin);
    }
  });
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
  const PanelKernels* kernels = std::is_same_v<W, int8_t> ? KernelsFor(rows, 4 * a.width * a.width) : nullptr;
  float* query = arena->Take<float>(rows * a.width);
  if (a.present_key != a.past_key || a.present_value != a.past_value) {
    parallel.For(a.batch * a.heads, [&](size_t i) { CopyPrefix(a, i / a.heads, i % a.heads); });
  }
  // First all rows in the general way if any row needs it, then in panels those that do not.
  uint8_t* left = arena->Take<uint8_t>(rows + kPanelRows);
  Panels panels{};
  if (kernels != nullptr) panels = TakePanels(arena, PanelsOf(rows), a.width);
  if (kernels == nullptr || SplitForProjection(*kernels, a, panels, left, parallel)) {
    const Activations<W>* x = PrepareRows<W>(a.x, rows, a.width, arena, parallel);
    parallel.For(tiles * a.heads,
                 [&](size_t i) { ProjectTile<W>(a, x, tiling, i % tiles, i / tiles, query); });
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
    ProjectOutRows<W>(again, tiling, parallel);
    for (size_t r = 0; r < rows; ++r) {
      if (left[r] != 0) std::copy(again.y + r * a.width, again.y + (r + 1) * a.width, a.y + r * a.width);
    }
  }
  return read;
}

template <class W>
ReadCount Run(const AttentionArgs& a, const Parallel& parallel) {
  const size_t rows = a.batch * a.tokens;
  if (rows == 0) {
    for (size_t i = 0; i < a.batch * a.heads; ++i) CopyPrefix(a, i / a.heads, i % a.heads);
    return {};
  }
  CallArena arena;
  if (rows > 1) return ManyRows<W>(a, &arena, parallel);
  return OneRow<W>(a, PrepareRows<W>(a.x, rows, a.width, &arena, parallel), &arena, parallel);
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
