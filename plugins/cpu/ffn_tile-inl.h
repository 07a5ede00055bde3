// SPDX-License-Identifier: Apache-2.0
// A tile of rows of SparseFFN over the active neurons of one piece: records outermost, rows inside, so that
// every weight passes once. Once per SIMD target.

#if defined(SHADOWC_CPU_FFN_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHADOWC_CPU_FFN_TILE_INL_H_
#undef SHADOWC_CPU_FFN_TILE_INL_H_
#else
#define SHADOWC_CPU_FFN_TILE_INL_H_
#endif

#include <algorithm>

#include "digits-inl.h"
#include "ffn_row-inl.h"
#include "int4-inl.h"
#include "int4_sum-inl.h"
#include "rows-inl.h"
#include "sparse_ffn.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {

// Neurons handled together; of int4 as many as for a row alone: where rows share a mask, the same bits.
template <class W>
inline constexpr size_t kGroup = kIsInt4<W> ? kInt4Rows : 8;

template <class W>
struct Group {
  size_t count = 0;
  uint32_t neuron[kGroup<W>];
  uint32_t rows[kGroup<W>];       // bit r: row r of the tile computes the neuron
  Pointer<W> half[2][kGroup<W>];  // fc1 and fc2 halves; padded to a multiple of 4 with the last one
};

// Walks the neurons of the active units, a group at a time.
template <class W>
class Groups {
 public:
  Groups(const FfnArgs& a, const uint32_t* masks, const uint32_t* units, size_t count)
      : a_(a), masks_(masks), units_(units), count_(count) {}

  void Next(Group<W>* g) {
    const Pointer<W> w = PointerOf<W>(a_.w, a_.scales);
    g->count = 0;
    while (g->count < kGroup<W> && unit_ < count_) {
      const size_t u = units_[unit_], f = u * a_.block + offset_;
      g->neuron[g->count] = static_cast<uint32_t>(f);
      g->rows[g->count] = masks_[u];
      g->half[0][g->count] = w + f * 2 * a_.width;
      g->half[1][g->count] = g->half[0][g->count] + a_.width;
      ++g->count;
      ++offset_;
      if (offset_ == a_.block || f + 1 == a_.neurons) {
        offset_ = 0;
        ++unit_;
      }
    }
    for (size_t c = g->count; c % 4 != 0; ++c) {
      g->half[0][c] = g->half[0][g->count - 1];
      g->half[1][c] = g->half[1][g->count - 1];
    }
  }

 private:
  const FfnArgs& a_;
  const uint32_t *masks_, *units_;
  size_t count_, unit_ = 0, offset_ = 0;
};

// The rows of a tile that a group works on, and their hidden values h [kTileRows, kGroup].
template <class W>
struct TileRows {
  size_t count;
  uint32_t row[kTileRows];
  const Activations<W>* x[kTileRows];
  float* y[kTileRows];
  float h[kTileRows * kGroup<W>];
};

template <class W>
HWY_INLINE void CollectRows(uint32_t bits, const Activations<W>* x, float* y, size_t width, TileRows<W>* t) {
  t->count = 0;
  for (uint32_t r = 0; bits != 0; ++r, bits >>= 1) {
    if ((bits & 1) == 0) continue;
    t->row[t->count] = r;
    t->x[t->count] = x + r;
    t->y[t->count] = y + r * width;
    ++t->count;
  }
}

template <class W>
HWY_INLINE void FirstLayer(const FfnArgs& a, const Group<W>& g, const Group<W>& next, TileRows<W>* t) {
  for (size_t c = 0; c < g.count; c += 4) {
    const Pointer<W>* later = c < next.count ? next.half[0] + c : nullptr;
    ForRowGroups(t->count, [&](auto rows, size_t r) HWY_ATTR {
      DotRows<rows()>(t->x + r, g.half[0] + c, a.width, later, t->h + r * kGroup<W> + c, kGroup<W>);
      later = nullptr;
    });
  }
  for (size_t r = 0; r < t->count; ++r) {
    float* h = t->h + r * kGroup<W>;
    for (size_t c = 0; c < g.count; ++c) {
      const size_t f = g.neuron[c];
      const bool active = (g.rows[c] >> t->row[r] & 1) != 0;
      h[c] = active ? Relu(h[c] * RowScale<W>(a.scales, 2 * f) + a.b1[f]) : 0.0f;
    }
  }
}

// Drops the neurons that are zero in every row, and the rows in which every neuron is zero. Order is kept.
template <class W>
HWY_INLINE void DropZeros(Group<W>* g, TileRows<W>* t) {
  size_t kept = 0;
  for (size_t c = 0; c < g->count; ++c) {
    bool any = false;
    for (size_t r = 0; r < t->count; ++r) any |= !(t->h[r * kGroup<W> + c] == 0.0f);
    if (!any) continue;
    g->neuron[kept] = g->neuron[c];
    g->half[1][kept] = g->half[1][c];
    for (size_t r = 0; r < t->count; ++r) t->h[r * kGroup<W> + kept] = t->h[r * kGroup<W> + c];
    ++kept;
  }
  g->count = kept;
  size_t rows = 0;
  for (size_t r = 0; r < t->count; ++r) {
    bool any = false;
    for (size_t c = 0; c < kept; ++c) any |= !(t->h[r * kGroup<W> + c] == 0.0f);
    if (!any) continue;
    t->y[rows] = t->y[r];
    std::copy(t->h + r * kGroup<W>, t->h + r * kGroup<W> + kept, t->h + rows * kGroup<W>);
    ++rows;
  }
  t->count = rows;
}

template <class W>
HWY_INLINE void SecondLayer(const FfnArgs& a, const Group<W>& g, const Group<W>& next, TileRows<W>* t) {
  for (size_t r = 0; r < t->count; ++r) {
    for (size_t c = 0; c < g.count; ++c)
      t->h[r * kGroup<W> + c] *= RowScale<W>(a.scales, 2 * g.neuron[c] + 1);
  }
  size_t later = a.skip_zeros ? 0 : next.count;
  ForRowGroups(t->count, [&](auto rows, size_t r) HWY_ATTR {
    AxpyRows<rows()>(t->y + r, Listed<W>{g.half[1]}, g.count, t->h + r * kGroup<W>, kGroup<W>, a.width,
                     a.int4_digits, later, Listed<W>{next.half[1]});
    later = 0;
  });
}

// x and y point to the tile's first row.
template <class W>
ReadCount Tile(const FfnArgs& a, const uint32_t* masks, const uint32_t* units, size_t count,
               const Activations<W>* x, float* y) {
  Groups<W> groups(a, masks, units, count);
  Group<W> group, next;
  TileRows<W> rows;
  size_t records = 0, second_halves = 0;
  groups.Next(&group);
  while (group.count != 0) {
    groups.Next(&next);
    uint32_t bits = 0;
    for (size_t c = 0; c < group.count; ++c) bits |= group.rows[c];
    CollectRows(bits, x, y, a.width, &rows);
    records += group.count;
    FirstLayer(a, group, next, &rows);
    if (a.skip_zeros) DropZeros(&group, &rows);
    second_halves += group.count;
    SecondLayer(a, group, next, &rows);
    group = next;
  }
  return CountRead<W>(records, second_halves, a.width);
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
