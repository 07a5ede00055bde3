// SPDX-License-Identifier: Apache-2.0
// One head of SparseAttention: the parts of its record, its place in the cache, and its attention. Once per
// SIMD target.

#if defined(SHADOWC_CPU_ATTENTION_HEAD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_ATTENTION_HEAD_INL_H_
#undef SHADOWC_CPU_ATTENTION_HEAD_INL_H_
#else
#define SHADOWC_CPU_ATTENTION_HEAD_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

#include "arena.h"
#include "attention_core-inl.h"
#include "attention_tile-inl.h"
#include "digits-inl.h"
#include "int4-inl.h"
#include "int4_in_order-inl.h"
#include "int4_sum-inl.h"
#include "rows-inl.h"
#include "sparse_attention.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

enum Part : size_t { kQuery, kKey, kValue, kOut };

// The four parts of one head's record.
template <class W>
struct Head {
  Head(const AttentionArgs& a, size_t h)
      : part_size(a.head_size * a.width),
        w(PointerOf<W>(a.w, a.scales) + h * 4 * part_size),
        scales(a.scales + h * 4 * a.head_size),
        bias(a.bqkv + h * 3 * a.head_size) {}
  // Row `row` behind `from`, where what is read after this record follows row `last`.
  HWY_INLINE Pointer<W> RowFrom(Pointer<W> from, size_t last, size_t width, size_t row) const {
    if (row <= last) return from + row * width;
    return after == nullptr ? from + last * width : after + (row - last - 1) * width;
  }

  // What is read after this record, to prefetch it as this one ends; the last row of this one if nothing is
  // known.
  Pointer<W> after{};
  size_t part_size;
  Pointer<W> w;
  const float* scales;  // of the record rows; not for int4, whose pointers have them
  const float* bias;
};

inline constexpr size_t kAheadBytes = size_t{16} << 10;

// out[r][d] = (x[r] . row d of the part * scale + bias) * factor, kColumns values of d at a time. The rows of
// the record that follow are prefetched as these are read, kAheadBytes before they are needed, or the next
// ones where rows are read in order; `following` parts are read after this one.
template <class W>
HWY_INLINE void Project(const AttentionArgs& a, const Head<W>& head, Part part, size_t following,
                        float factor, const Activations<W>* const* x, size_t count, float* const* out) {
  constexpr size_t kColumns = 4;
  const size_t d_end = a.head_size, width = a.width;
  const size_t ahead_rows = count == 1 && ReadsInOrder<W>(width)
                                ? kColumns
                                : std::max(kColumns, kAheadBytes / (RowElements<W>(width) * sizeof(W)));
  const Pointer<W> w = head.w + part * head.part_size;
  const size_t last = (following + 1) * d_end - 1;  // row of the last part that will be read
  const float *scales = head.scales + part * d_end, *bias = head.bias + part * d_end;
  for (size_t d = 0; d < d_end; d += kColumns) {
    const size_t here = std::min(kColumns, d_end - d);
    Pointer<W> rows[kColumns], ahead[kColumns];
    for (size_t c = 0; c < kColumns; ++c) {
      rows[c] = w + (d + std::min(c, here - 1)) * width;
      ahead[c] = head.RowFrom(w, last, width, d + ahead_rows + c);
    }
    const Pointer<W>* later = ahead;
    float dots[kTileRows * kColumns];
#if SHADOWC_DIGITS
    if constexpr (kReadInOrder && kIsInt4<W>) {
      if (count == 1 && x[0]->Exact() && ReadsInOrder<int8_t>(width)) {
        Pointer<W> once[kColumns];
        for (size_t c = 0; c < kColumns; ++c) once[c] = head.RowFrom(w, last, width, d + ahead_rows / 2 + c);
        DotDigits(*x[0], rows, width, RowsAhead<kColumns>{ahead, once}, dots);
        for (size_t c = 0; c < here; ++c) out[0][d + c] = (dots[c] + bias[d + c]) * factor;
        continue;
      }
    }
#endif
    ForRowGroups(count, [&](auto group, size_t r) HWY_ATTR {
      DotRows<group()>(x + r, rows, width, later, dots + r * kColumns, kColumns);
      later = nullptr;
    });
    for (size_t r = 0; r < count; ++r) {
      for (size_t c = 0; c < here; ++c)
        out[r][d + c] = (dots[r * kColumns + c] * RowScale<W>(scales, d + c) + bias[d + c]) * factor;
    }
  }
}

#if SHADOWC_DIGITS

// y += h [head_size] times `width` columns of the head's output rows, at w, eight at a time.
HWY_INLINE void ProjectOutInOrder(const AttentionArgs& a, const Head<Int4Pair>& head, Int4Pointer w,
                                  const float* h, size_t width, float* y) {
  for (size_t d = 0; d < a.head_size; d += 8) {
    Int4Pointer rows[8], once[8], twice[8];
    for (size_t c = 0; c < 8; ++c) {
      rows[c] = w + (d + c) * a.width;
      once[c] = head.RowFrom(w, a.head_size - 1, a.width, d + 8 + c);
      twice[c] = head.RowFrom(w, a.head_size - 1, a.width, d + 16 + c);
    }
    AddEight(y, rows, h + d, width, a.int4_digits, RowsAhead<8>{twice, once});
  }
}

#endif  // SHADOWC_DIGITS

// y[r][begin ... end) += context[r] (head_size values) times these columns of the head's output rows.
template <class W>
HWY_INLINE void ProjectOut(const AttentionArgs& a, const Head<W>& head, const float* const* context,
                           size_t count, size_t begin, size_t end, float* const* y, float* h) {
  constexpr size_t kRowsAtOnce = kIsInt4<W> ? kInt4Rows : 8;
  const Pointer<W> w = head.w + kOut * head.part_size + begin;
  const float* scales = head.scales + kOut * a.head_size;
  for (size_t r = 0; r < count; ++r) {
    for (size_t d = 0; d < a.head_size; ++d) h[r * a.head_size + d] = context[r][d] * RowScale<W>(scales, d);
  }
#if SHADOWC_DIGITS
  if constexpr (kReadInOrder && kIsInt4<W>) {
    if (count == 1 && ReadsInOrder<int8_t>(end - begin) && a.head_size % 8 == 0)
      return ProjectOutInOrder(a, head, w, h, end - begin, y[0]);
  }
#endif
  for (size_t d = 0; d < a.head_size; d += kRowsAtOnce) {
    const size_t rows = std::min(kRowsAtOnce, a.head_size - d);
    const bool last = d + kRowsAtOnce >= a.head_size;
    const Strided<W> here{w + d * a.width, a.width};
    const Strided<W> ahead{last ? head.after : w + (d + kRowsAtOnce) * a.width, a.width};
    size_t later = !last                   ? std::min(kRowsAtOnce, a.head_size - d - kRowsAtOnce)
                   : head.after == nullptr ? 0
                                           : kRowsAtOnce;
    ForRowGroups(count, [&](auto group, size_t r) HWY_ATTR {
      AxpyRows<group()>(y + r, here, rows, h + r * a.head_size + d, a.head_size, end - begin, a.int4_digits,
                        later, ahead);
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
inline void CopyPrefix(const AttentionArgs& a, size_t batch, size_t head) {
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

// What the row of the only token of batch entry 0 will read of the cache first.
inline void PrefetchCache(const AttentionArgs& a, size_t head) {
  const size_t start = static_cast<size_t>(a.start[0]), end = static_cast<size_t>(a.past[0]) + 1;
  if (start >= end) return;
  const size_t offset = SlotOffset(a, 0, head, start);
  DispatchCache(a, [&](const auto* type) HWY_ATTR {
    PrefetchCache(static_cast<decltype(type)>(a.present_key) + offset,
                  static_cast<decltype(type)>(a.present_value) + offset, end - start, a.head_size);
  });
}

// Attention of the rows `token[0 ... count)` (ascending, at most kTileRows) of one (batch, head). query and
// context point to the values of token 0 with row stride `query_stride` and E.
inline void Attend(const AttentionArgs& a, size_t batch, size_t head, const uint32_t* token, size_t count,
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
  const size_t offset = SlotOffset(a, batch, head, start);
  if (seeing >= kManyQueries) {
    DispatchCache(a, [&](const auto* type) HWY_ATTR {
      AttendMany(queries, sees, seeing, static_cast<decltype(type)>(a.present_key) + offset,
                 static_cast<decltype(type)>(a.present_value) + offset, a.head_size, contexts, arena);
    });
    return;
  }
  const size_t stride = (sees[seeing - 1] + 3) / 4 * 4;
  float* logits = arena->Take<float>(seeing * stride);
  DispatchCache(a, [&](const auto* type) HWY_ATTR {
    AttendTile(queries, sees, seeing, static_cast<decltype(type)>(a.present_key) + offset,
               static_cast<decltype(type)>(a.present_value) + offset, a.head_size, contexts, logits, stride);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
