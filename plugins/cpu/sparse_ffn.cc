// SPDX-License-Identifier: Apache-2.0
#include "sparse_ffn.h"

#include <algorithm>

#include "arena.h"
#include "ffn_panels.h"
#include "panel_rows.h"
#include "sum_tree.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sparse_ffn.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "digits-inl.h"
#include "ffn_row-inl.h"
#include "hwy/highway.h"
#include "int4-inl.h"
#include "int4_sum-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {

// ---- several rows: records outermost, the rows of a tile inside

inline constexpr size_t kGroup = 8;  // neurons handled together

template <class W>
struct Group {
  size_t count = 0;
  uint32_t neuron[kGroup];
  uint32_t rows[kGroup];       // bit r: row r of the tile computes the neuron
  Pointer<W> half[2][kGroup];  // fc1 and fc2 halves; padded to a multiple of 4 with the last one
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
template <class W>
struct TileRows {
  size_t count;
  uint32_t row[kTileRows];
  const Activations<W>* x[kTileRows];
  float* y[kTileRows];
  float h[kTileRows * kGroup];
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
      DotRows<rows()>(t->x + r, g.half[0] + c, a.width, later, t->h + r * kGroup + c, kGroup);
      later = nullptr;
    });
  }
  for (size_t r = 0; r < t->count; ++r) {
    float* h = t->h + r * kGroup;
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
HWY_INLINE void SecondLayer(const FfnArgs& a, const Group<W>& g, const Group<W>& next, TileRows<W>* t) {
  for (size_t r = 0; r < t->count; ++r) {
    for (size_t c = 0; c < g.count; ++c) t->h[r * kGroup + c] *= RowScale<W>(a.scales, 2 * g.neuron[c] + 1);
  }
  size_t later = a.skip_zeros ? 0 : next.count;
  ForRowGroups(t->count, [&](auto rows, size_t r) HWY_ATTR {
    AxpyRows<rows()>(t->y + r, Listed<W>{g.half[1]}, g.count, t->h + r * kGroup, kGroup, a.width, later,
                     Listed<W>{next.half[1]});
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

// ---- cutting the work
//
// Into pieces of units, by the size of the weights alone: not by what is active, how many rows there are or
// how many threads. A row's sums are then grouped in one way, whatever shares the call with it.

inline constexpr size_t kMostPieces = 32;

size_t PiecesOf(const FfnArgs& a, size_t record) {
  return shadowc::PiecesOf(a.neurons * record, kMostPieces);
}

// First unit of a piece.
size_t PieceBegin(const FfnArgs& a, size_t pieces, size_t piece) {
  return a.selection.units * piece / pieces;
}

// The active units of one row from `begin` to `end`, ascending. `list` has room for them and one vector more.
size_t ActiveUnitsOf(const RowSelection& row, size_t begin, size_t end, uint32_t* list) {
  const DF df;
  const hn::RebindToUnsigned<DF> du;
  const size_t lanes = hn::Lanes(df);
  const VF threshold = hn::Set(df, row.threshold);
  size_t count = 0, u = begin;
  for (; row.scores != nullptr && u + lanes <= end; u += lanes) {
    const auto active = hn::Not(hn::Lt(hn::LoadU(df, row.scores + u), threshold));
    const auto index = hn::Iota(du, static_cast<uint32_t>(u));
    count += hn::CompressStore(index, hn::RebindMask(du, active), du, list + count);
  }
  for (; u < end; ++u) {
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

// The active neurons of one row from unit `begin` to `end`. `list` has room for all and one vector more.
size_t ActiveNeurons(const FfnArgs& a, const RowSelection& selection, size_t begin, size_t end,
                     uint32_t* list) {
  const size_t count = ActiveUnitsOf(selection, begin, end, list);
  return a.block == 1 ? count : ExpandBlocks(a, list, count);
}

// Room for the neurons of one piece and one vector more.
size_t MostListed(const FfnArgs& a, size_t pieces) {
  return (a.selection.units / pieces + 1) * a.block + hn::MaxLanes(DF());
}

// The active neurons of a piece, and the first ones of piece `next` (none if there is no such piece). `list`
// has room for two pieces.
Neurons NeuronsOf(const FfnArgs& a, const RowSelection& selection, size_t pieces, size_t piece, size_t next,
                  uint32_t* list) {
  const auto active = [&](size_t p, uint32_t* to) {
    return ActiveNeurons(a, selection, PieceBegin(a, pieces, p), PieceBegin(a, pieces, p + 1), to);
  };
  Neurons neurons{list, active(piece, list), 0};
  neurons.with_next = neurons.count;
  if (next < pieces) neurons.with_next += std::min<size_t>(kMostAhead, active(next, list + neurons.count));
  return neurons;
}

template <class W>
ReadCount OneRow(const FfnArgs& a, CallArena* arena, const Parallel& parallel) {
  const size_t pieces = PiecesOf(a, 2 * RowElements<W>(a.width) * sizeof(W));
  const RowSelection selection = SelectionOf(a.selection, a.tokens, 0);
  const OneRowOfX<W> x(a.x, a.norm, a.width);
  const auto row = a.skip_zeros ? &RowSkippingZeros<W> : &RowWholeRecords<W>;
  float* partial = arena->Take<float>(pieces * a.width);
  SumTree sums(partial, pieces, a.width, arena);
  const SumRuns runs(pieces, Parallel::LikelyThreads(), arena);
  ReadCount read[kMostPieces];
  parallel.For(runs.Count(), [&](size_t r) {
    const auto [first, leaves] = runs[r];
    const size_t after = r + 1 < runs.Count() ? runs[r + 1].first : pieces;
    Arena& memory = ThreadArena();
    uint32_t* list = memory.Take<uint32_t>(2 * MostListed(a, pieces));
    // Not straight into `partial`: the next run's sums lie behind it, and the prefetchers of one core would
    // keep taking their first lines away from the other (measured: a fifth of the bandwidth).
    float* sum = memory.Take<float>(SumDepth(leaves) * a.width);
    SumInOrder(first, leaves, pieces, a.width, sum, [&](size_t p, float* y) {
      const Neurons neurons =
          NeuronsOf(a, selection, pieces, p, p + 1 < first + leaves ? p + 1 : after, list);
      std::fill(y, y + a.width, 0.0f);
      if (neurons.count != 0) read[p] = row(a, x, neurons, y);
    });
    std::copy(sum, sum + a.width, partial + first * a.width);
    sums.Finish(first, leaves);
  });
  WithBias(a.b2, a.residual, partial, 1, a.width, a.y);
  ReadCount total;
  for (size_t p = 0; p < pieces; ++p) total += read[p];
  return total;
}

// From this many tiles on a tile is one task, and adds its pieces up by itself.
inline constexpr size_t kManyTiles = 8;

template <class W>
class ManyRows {
 public:
  // `wanted`: which rows are computed; null: all. Of the others y is the bias.
  ManyRows(const FfnArgs& a, const Activations<W>* x, const uint8_t* wanted, CallArena* arena,
           const Parallel& parallel)
      : a_(a),
        x_(x),
        rows_(a.batch * a.tokens),
        tiles_((rows_ + kTileRows - 1) / kTileRows),
        units_(a.selection.units),
        pieces_(PiecesOf(a, 2 * RowElements<W>(a.width) * sizeof(W))),
        masks_(arena->Take<uint32_t>(tiles_ * units_)),
        lists_(arena->Take<uint32_t>(tiles_ * units_)),
        counts_(arena->Take<size_t>(tiles_)) {
    parallel.For(tiles_, [&](size_t t) {
      TileMasks(a.selection, a.tokens, t * kTileRows, Count(t), masks_ + t * units_);
      KeepRows(wanted, t * kTileRows, Count(t), masks_ + t * units_, units_);
      counts_[t] = ActiveUnits(masks_ + t * units_, units_, lists_ + t * units_);
    });
  }

  ReadCount Run(CallArena* arena, const Parallel& parallel) const {
    const size_t each = tiles_ < kManyTiles ? pieces_ : 1;
    ReadCount* read = arena->Take<ReadCount>(tiles_ * each);
    if (tiles_ < kManyTiles) {
      ByPieces(read, arena, parallel);
    } else {
      parallel.For(tiles_, [&](size_t t) { read[t] = WholeTile(t); });
    }
    ReadCount total;
    for (size_t i = 0; i < tiles_ * each; ++i) total += read[i];
    return total;
  }

 private:
  size_t Count(size_t t) const { return std::min(kTileRows, rows_ - t * kTileRows); }
  // y of a tile, from the sum of its pieces.
  void Finish(size_t t, const float* sum) const {
    const size_t first = t * kTileRows * a_.width;
    const float* residual = a_.residual == nullptr ? nullptr : a_.residual + first;
    WithBias(a_.b2, residual, sum, Count(t), a_.width, a_.y + first);
  }

  // Sets y [rows of the tile, E] to what the piece adds.
  ReadCount Piece(size_t t, size_t p, float* y) const {
    const uint32_t* list = lists_ + t * units_;
    const auto from = [&](size_t piece) {
      return static_cast<size_t>(std::lower_bound(list, list + counts_[t], PieceBegin(a_, pieces_, piece)) -
                                 list);
    };
    const size_t begin = from(p), end = from(p + 1);
    std::fill(y, y + Count(t) * a_.width, 0.0f);
    return Tile<W>(a_, masks_ + t * units_, list + begin, end - begin, x_ + t * kTileRows, y);
  }

  void ByPieces(ReadCount* read, CallArena* arena, const Parallel& parallel) const {
    float* partial = arena->Take<float>(pieces_ * rows_ * a_.width);
    const auto leaves = [&](size_t t) { return partial + t * kTileRows * pieces_ * a_.width; };
    SumTree* sums = arena->Take<SumTree>(tiles_);
    for (size_t t = 0; t < tiles_; ++t)
      new (sums + t) SumTree(leaves(t), pieces_, Count(t) * a_.width, arena);
    parallel.For(tiles_ * pieces_, [&](size_t task) {
      const size_t t = task / pieces_, p = task % pieces_;
      read[task] = Piece(t, p, leaves(t) + p * Count(t) * a_.width);
      sums[t].Finish(p);
    });
    parallel.For(tiles_, [&](size_t t) { Finish(t, leaves(t)); });
  }

  ReadCount WholeTile(size_t t) const {
    const size_t size = Count(t) * a_.width;
    float* sum = ThreadArena().Take<float>(SumDepth(pieces_) * size);
    ReadCount read;
    SumInOrder(0, TreeWidth(pieces_), pieces_, size, sum,
               [&](size_t p, float* y) { read += Piece(t, p, y); });
    Finish(t, sum);
    return read;
  }

  const FfnArgs& a_;
  const Activations<W>* x_;
  size_t rows_, tiles_, units_, pieces_;
  uint32_t *masks_, *lists_;
  size_t* counts_;
};

template <class W>
ReadCount RunManyRows(const FfnArgs& a, const uint8_t* wanted, CallArena* arena, const Parallel& parallel) {
  const Activations<W>* x = PrepareRows<W>(a.x, a.batch * a.tokens, a.width, arena, parallel);
  return ManyRows<W>(a, x, wanted, arena, parallel).Run(arena, parallel);
}

template <class W>
ReadCount Run(const FfnArgs& given, const Parallel& parallel) {
  FfnArgs a = given;
  const size_t rows = a.batch * a.tokens;
  a.residual = a.norm.scale == nullptr ? nullptr : a.x;
  if (rows == 0) return {};
  CallArena arena;
  if (rows == 1) return OneRow<W>(a, &arena, parallel);
  a.x = NormaliseRows(a.x, a.norm, rows, a.width, &arena, parallel);
  const PanelKernels* kernels = KernelsFor(a.type, a.rounding, rows, a.width, a.neurons * 2 * a.width);
  if (kernels == nullptr) return RunManyRows<W>(a, nullptr, &arena, parallel);
  uint8_t* left = arena.Take<uint8_t>(rows + kPanelRows);
  ReadCount read;
  if (FfnPanels(*kernels, a, &arena, parallel, left, &read)) return read;
  FfnArgs again = a;
  again.y = arena.Take<float>(rows * a.width);
  // Outliers are common, other rows without digits are not: only for the latter the count of all rows is
  // exact.
  const bool outliers = a.rounding == Rounding::kFinely;
  const ReadCount again_read = RunManyRows<W>(again, outliers ? left : nullptr, &arena, parallel);
  if (!outliers) read = again_read;
  for (size_t r = 0; r < rows; ++r) {
    if (left[r] != 0) std::copy(again.y + r * a.width, again.y + (r + 1) * a.width, a.y + r * a.width);
  }
  return read;
}

}  // namespace

ReadCount SparseFfn(const FfnArgs& args, const Parallel& parallel) {
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

HWY_EXPORT(SparseFfn);

ReadCount SparseFfn(const FfnArgs& args, const Parallel& parallel) {
  return HWY_DYNAMIC_DISPATCH(SparseFfn)(args, parallel);
}

}  // namespace shadowc
#endif  // HWY_ONCE
