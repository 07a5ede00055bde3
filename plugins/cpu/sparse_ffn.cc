// SPDX-License-Identifier: Apache-2.0
#include "sparse_ffn.h"

#include <algorithm>

#include "arena.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sparse_ffn.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "hwy/highway.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {

HWY_INLINE float Relu(float u) { return u < 0.0f ? 0.0f : u; }  // NaN stays

template <class W>
ReadCount CountRead(size_t records, size_t second_halves, size_t width) {
  const size_t half = width * sizeof(W) + sizeof(float);
  return {static_cast<int64_t>(records), static_cast<int64_t>((records + second_halves) * half)};
}

// ---- one row: the decode path, bound by memory bandwidth

// How many list entries ahead to prefetch: 16 KiB of what is certain to be read, which covers the latency of
// memory at a core's full bandwidth (measured flat from 12 to 24 KiB), but at least 2 and at most 8 entries.
size_t Ahead(size_t bytes_per_entry) {
  return std::clamp<size_t>((size_t{16} << 10) / bytes_per_entry, 2, 8);
}

// Both halves of record list[k]; while they are read, those of a later record are fetched into L2, line by
// line. Scattered records then run at the bandwidth of a sequential read.
template <class W>
ReadCount RowWholeRecords(const FfnArgs& a, const uint32_t* list, size_t count, float* y) {
  const W* w = static_cast<const W*>(a.w);
  const size_t width = a.width, ahead = Ahead(2 * width * sizeof(W));
  for (size_t k = 0; k < std::min(ahead, count); ++k)
    PrefetchStep(w + size_t{list[k]} * 2 * width, 2 * width);
  for (size_t k = 0; k < count; ++k) {
    const size_t f = list[k];
    const W* record = w + f * 2 * width;
    const W* later = k + ahead < count ? w + size_t{list[k + ahead]} * 2 * width : nullptr;
    const float h = Relu(Dot(a.x, record, width, later) * a.scales[2 * f] + a.b1[f]);
    Axpy(h * a.scales[2 * f + 1], record + width, y, width, later != nullptr ? later + width : nullptr);
  }
  return CountRead<W>(count, count, width);
}

// Only fc1 halves are certain to be needed. A neuron that turns out nonzero is announced: its fc2 half is
// fetched during the next dot product and added after the one that follows.
template <class W>
ReadCount RowSkippingZeros(const FfnArgs& a, const uint32_t* list, size_t count, float* y) {
  const W* w = static_cast<const W*>(a.w);
  const size_t width = a.width, ahead = Ahead(width * sizeof(W));
  for (size_t k = 0; k < std::min(ahead, count); ++k) PrefetchStep(w + size_t{list[k]} * 2 * width, width);
  struct Pending {
    const W* half = nullptr;
    float h = 0.0f;
  } pending[2];
  size_t added = 0;
  const auto finish = [&](Pending& p) HWY_ATTR {
    if (p.half == nullptr) return;
    Axpy(p.h, p.half, y, width, static_cast<const W*>(nullptr));
    p.half = nullptr;
    ++added;
  };
  for (size_t k = 0; k < count; ++k) {
    const size_t f = list[k];
    const W* record = w + f * 2 * width;
    const W* later = k + ahead < count ? w + size_t{list[k + ahead]} * 2 * width : nullptr;
    const float h =
        Relu(Dot(a.x, record, width, later, pending[(k + 1) % 2].half) * a.scales[2 * f] + a.b1[f]);
    finish(pending[k % 2]);
    if (!(h == 0.0f)) pending[k % 2] = {record + width, h * a.scales[2 * f + 1]};
  }
  finish(pending[count % 2]);
  finish(pending[(count + 1) % 2]);
  return CountRead<W>(count, added, width);
}

// ---- several rows: records outermost, the rows of a tile inside

inline constexpr size_t kGroup = 8;  // neurons handled together

template <class W>
struct Group {
  size_t count = 0;
  uint32_t neuron[kGroup];
  uint32_t rows[kGroup];     // bit r: row r of the tile computes the neuron
  const W* half[2][kGroup];  // fc1 and fc2 halves; padded to a multiple of 4 with the last one
};

// Walks the neurons of the active units, a group at a time.
template <class W>
class Groups {
 public:
  Groups(const FfnArgs& a, const uint32_t* masks, const uint32_t* units, size_t count)
      : a_(a), masks_(masks), units_(units), count_(count) {}

  void Next(Group<W>* g) {
    const W* w = static_cast<const W*>(a_.w);
    g->count = 0;
    while (g->count < kGroup && unit_ < count_) {
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
struct TileRows {
  size_t count;
  uint32_t row[kTileRows];
  const float* x[kTileRows];
  float* y[kTileRows];
  float h[kTileRows * kGroup];
};

HWY_INLINE void CollectRows(uint32_t bits, const float* x, float* y, size_t width, TileRows* t) {
  t->count = 0;
  for (uint32_t r = 0; bits != 0; ++r, bits >>= 1) {
    if ((bits & 1) == 0) continue;
    t->row[t->count] = r;
    t->x[t->count] = x + r * width;
    t->y[t->count] = y + r * width;
    ++t->count;
  }
}

template <class W>
HWY_INLINE void FirstLayer(const FfnArgs& a, const Group<W>& g, const Group<W>& next, TileRows* t) {
  for (size_t c = 0; c < g.count; c += 4) {
    const W* const* later = c < next.count ? next.half[0] + c : nullptr;
    ForRowGroups(t->count, [&](auto rows, size_t r) HWY_ATTR {
      DotTile<rows()>(t->x + r, g.half[0][c], g.half[0][c + 1], g.half[0][c + 2], g.half[0][c + 3], a.width,
                      later, t->h + r * kGroup + c, kGroup);
      later = nullptr;
    });
  }
  for (size_t r = 0; r < t->count; ++r) {
    float* h = t->h + r * kGroup;
    for (size_t c = 0; c < g.count; ++c) {
      const size_t f = g.neuron[c];
      const bool active = (g.rows[c] >> t->row[r] & 1) != 0;
      h[c] = active ? Relu(h[c] * a.scales[2 * f] + a.b1[f]) : 0.0f;
    }
  }
}

// Drops the neurons that are zero in every row, and the rows in which every neuron is zero. Order is kept.
template <class W>
HWY_INLINE void DropZeros(Group<W>* g, TileRows* t) {
  size_t kept = 0;
  for (size_t c = 0; c < g->count; ++c) {
    bool any = false;
    for (size_t r = 0; r < t->count; ++r) any |= !(t->h[r * kGroup + c] == 0.0f);
    if (!any) continue;
    g->neuron[kept] = g->neuron[c];
    g->half[1][kept] = g->half[1][c];
    for (size_t r = 0; r < t->count; ++r) t->h[r * kGroup + kept] = t->h[r * kGroup + c];
    ++kept;
  }
  g->count = kept;
  size_t rows = 0;
  for (size_t r = 0; r < t->count; ++r) {
    bool any = false;
    for (size_t c = 0; c < kept; ++c) any |= !(t->h[r * kGroup + c] == 0.0f);
    if (!any) continue;
    t->y[rows] = t->y[r];
    std::copy(t->h + r * kGroup, t->h + r * kGroup + kept, t->h + rows * kGroup);
    ++rows;
  }
  t->count = rows;
}

template <class W>
HWY_INLINE void SecondLayer(const FfnArgs& a, const Group<W>& g, const Group<W>& next, TileRows* t) {
  for (size_t r = 0; r < t->count; ++r) {
    for (size_t c = 0; c < g.count; ++c) t->h[r * kGroup + c] *= a.scales[2 * g.neuron[c] + 1];
  }
  size_t later = a.skip_zeros ? 0 : next.count;
  ForRowGroups(t->count, [&](auto rows, size_t r) HWY_ATTR {
    AxpyTile<rows()>(t->y + r, Listed<W>{g.half[1]}, g.count, t->h + r * kGroup, kGroup, a.width, later,
                     Listed<W>{next.half[1]});
    later = 0;
  });
}

// x and y point to the tile's first row.
template <class W>
ReadCount Tile(const FfnArgs& a, const uint32_t* masks, const uint32_t* units, size_t count, const float* x,
               float* y) {
  Groups<W> groups(a, masks, units, count);
  Group<W> group, next;
  TileRows rows;
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

// ---- cutting the work

inline constexpr size_t kMostPieces = 32;

// The active units of one row, ascending. `list` has room for `units` and one vector more.
size_t ActiveUnitsOf(const RowSelection& row, size_t units, uint32_t* list) {
  const DF df;
  const hn::RebindToUnsigned<DF> du;
  const size_t lanes = hn::Lanes(df);
  const VF threshold = hn::Set(df, row.threshold);
  size_t count = 0, u = 0;
  for (; row.scores != nullptr && u + lanes <= units; u += lanes) {
    const auto active = hn::Not(hn::Lt(hn::LoadU(df, row.scores + u), threshold));
    const auto index = hn::Iota(du, static_cast<uint32_t>(u));
    count += hn::CompressStore(index, hn::RebindMask(du, active), du, list + count);
  }
  for (; u < units; ++u) {
    list[count] = static_cast<uint32_t>(u);
    count += row.scores == nullptr || !(row.scores[u] < row.threshold);
  }
  return count;
}

// Replaces units by their neurons, from the back, in place.
size_t ExpandBlocks(const FfnArgs& a, uint32_t* list, size_t count) {
  const size_t last = a.selection.units - 1, rest = a.neurons - last * a.block;
  const bool has_last = count != 0 && list[count - 1] == last;
  const size_t neurons = count * a.block - (has_last ? a.block - rest : 0);
  for (size_t k = count, to = neurons; k-- > 0;) {
    const size_t unit = list[k], size = unit == last ? rest : a.block;
    to -= size;
    for (size_t j = size; j-- > 0;) list[to + j] = static_cast<uint32_t>(unit * a.block + j);
  }
  return neurons;
}

template <class W>
ReadCount OneRow(const FfnArgs& a, CallArena* arena, const Parallel& parallel) {
  uint32_t* list = arena->Take<uint32_t>(a.neurons + a.block + hn::MaxLanes(DF()));
  size_t count = ActiveUnitsOf(SelectionOf(a.selection, a.tokens, 0), a.selection.units, list);
  if (a.block != 1) count = ExpandBlocks(a, list, count);
  const size_t pieces = PiecesOf(count * 2 * a.width * sizeof(W), kMostPieces);
  const auto row = a.skip_zeros ? &RowSkippingZeros<W> : &RowWholeRecords<W>;
  float* partial = arena->Take<float>(pieces * a.width);
  ReadCount read[kMostPieces];
  parallel.For(pieces, [&](size_t p) {
    const size_t begin = count * p / pieces, end = count * (p + 1) / pieces;
    float* mine = partial + p * a.width;
    std::fill(mine, mine + a.width, 0.0f);
    read[p] = row(a, list + begin, end - begin, mine);
  });
  ReducePartials(partial, count == 0 ? 0 : pieces, 1, a.width, a.b2, a.y, parallel);
  ReadCount total;
  for (size_t p = 0; p < pieces; ++p) total += read[p];
  return total;
}

template <class W>
ReadCount ManyRows(const FfnArgs& a, CallArena* arena, const Parallel& parallel) {
  const size_t rows = a.batch * a.tokens, tiles = (rows + kTileRows - 1) / kTileRows,
               units = a.selection.units;
  uint32_t* masks = arena->Take<uint32_t>(tiles * units);
  uint32_t* lists = arena->Take<uint32_t>(tiles * units);
  size_t* counts = arena->Take<size_t>(tiles);
  parallel.For(tiles, [&](size_t t) {
    TileMasks(a.selection, a.tokens, t * kTileRows, std::min(kTileRows, rows - t * kTileRows),
              masks + t * units);
    counts[t] = ActiveUnits(masks + t * units, units, lists + t * units);
  });
  // Cut by unit, not by what is active: a row's sums are then grouped the same way whatever its neighbours in
  // the batch leave out.
  const size_t pieces =
      PiecesOf(units * a.block * 2 * a.width * sizeof(W), std::max<size_t>(1, kMostPieces / tiles));
  float* partial = pieces == 1 ? a.y : arena->Take<float>(pieces * rows * a.width);
  ReadCount* read = arena->Take<ReadCount>(tiles * pieces);
  parallel.For(tiles * pieces, [&](size_t task) {
    const size_t t = task / pieces, p = task % pieces, first = t * kTileRows;
    const size_t last = std::min(rows, first + kTileRows);
    const uint32_t* list = lists + t * units;
    const auto from = [&](size_t piece) {
      return static_cast<size_t>(std::lower_bound(list, list + counts[t], units * piece / pieces) - list);
    };
    const size_t begin = from(p), end = from(p + 1);
    float* mine = partial + (p * rows + first) * a.width;
    for (size_t r = 0; r < last - first; ++r) {
      float* y = mine + r * a.width;
      if (pieces == 1) {
        std::copy(a.b2, a.b2 + a.width, y);
      } else {
        std::fill(y, y + a.width, 0.0f);
      }
    }
    read[task] = Tile<W>(a, masks + t * units, list + begin, end - begin, a.x + first * a.width, mine);
  });
  if (pieces > 1) ReducePartials(partial, pieces, rows, a.width, a.b2, a.y, parallel);
  ReadCount total;
  for (size_t i = 0; i < tiles * pieces; ++i) total += read[i];
  return total;
}

}  // namespace

ReadCount SparseFfn(const FfnArgs& args, const Parallel& parallel) {
  ReadCount read;
  DispatchWeights(args.type, [&](auto type) {
    using W = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    CallArena arena;
    if (args.batch * args.tokens == 0) return;
    read = args.batch * args.tokens == 1 ? OneRow<W>(args, &arena, parallel)
                                         : ManyRows<W>(args, &arena, parallel);
  });
  return read;
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {

HWY_EXPORT(SparseFfn);

ReadCount SparseFfn(const FfnArgs& args, const Parallel& parallel) {
  return HWY_DYNAMIC_DISPATCH(SparseFfn)(args, parallel);
}

}  // namespace shadowc
#endif  // HWY_ONCE
