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
#include "ffn_tile-inl.h"
#include "hwy/highway.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace {

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

// The active neurons of a run of pieces, one behind the other, and the first ones of the run that this
// thread will probably take next.
class RunNeurons {
 public:
  RunNeurons(const FfnArgs& a, const RowSelection& selection, size_t pieces, const SumRuns::Run& run,
             Arena* memory)
      : list_(memory->Take<uint32_t>((run.leaves + 1) * MostListed(a, pieces))),
        begin_(memory->Take<size_t>(run.leaves + 1)) {
    const auto append = [&](size_t p) {
      return ActiveNeurons(a, selection, PieceBegin(a, pieces, p), PieceBegin(a, pieces, p + 1),
                           list_ + end_);
    };
    for (size_t k = 0; k < run.leaves; ++k) {
      begin_[k] = end_;
      end_ += append(run.first + k);
    }
    begin_[run.leaves] = end_;
    if (run.next < pieces) end_ += std::min<size_t>(kMostAhead, append(run.next));
  }

  // Those of the k-th piece, and after them what follows in this list.
  Neurons operator[](size_t k) const {
    return {list_ + begin_[k], begin_[k + 1] - begin_[k], end_ - begin_[k], begin_[k] != 0};
  }

 private:
  uint32_t* list_;
  size_t *begin_, end_ = 0;
};

template <class W>
ReadCount OneRow(const FfnArgs& a, CallArena* arena, const Parallel& parallel) {
  const size_t pieces = PiecesOf(a, 2 * RowElements<W>(a.width) * sizeof(W));
  const RowSelection selection = SelectionOf(a.selection, a.tokens, 0);
  const OneRowOfX<W> x(a.x, a.norm, a.width, a.int4_digits);
  const auto row = a.skip_zeros ? &RowSkippingZeros<W> : &RowWholeRecords<W>;
  SumTree tree(pieces, a.width, arena);
  const SumRuns runs(pieces, parallel.LikelyThreads(), nullptr, arena);
  const SumRuns::Sums sums(runs, a.width, arena);
  ReadCount* read = new (arena->Take<ReadCount>(runs.Count())) ReadCount[runs.Count()]{};
  parallel.For(runs.Count(), [&](size_t r) {
    const SumRuns::Run& run = runs[r];
    if (run.leaves == 0) return;
    Arena& memory = ThreadArena();
    const RunNeurons neurons(a, selection, pieces, run, &memory);
    ReadCount all;
    SumInOrder(run.first, run.leaves, pieces, a.width, sums[r],
               memory.Take<float>(SumDepth(run.leaves) * a.width), AllLeaves(), [&](size_t p, float* y) {
                 const Neurons here = neurons[p - run.first];
                 if (here.count != 0) {
                   all += row(a, x, here, y);
                 } else {
                   std::fill(y, y + a.width, 0.0f);
                 }
               });
    read[r] = all;
    tree.Finish(run.first, run.leaves, sums[r], AllLeaves());
  });
  WithBias(a.b2, a.residual, tree.Sum(), 1, a.width, a.y);
  ReadCount total;
  for (size_t r = 0; r < runs.Count(); ++r) total += read[r];
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
    for (size_t t = 0; t < tiles_; ++t) new (sums + t) SumTree(pieces_, Count(t) * a_.width, arena);
    parallel.For(tiles_ * pieces_, [&](size_t task) {
      const size_t t = task / pieces_, p = task % pieces_;
      float* leaf = leaves(t) + p * Count(t) * a_.width;
      read[task] = Piece(t, p, leaf);
      sums[t].Finish(p, leaf);
    });
    parallel.For(tiles_, [&](size_t t) { Finish(t, sums[t].Sum()); });
  }

  ReadCount WholeTile(size_t t) const {
    const size_t size = Count(t) * a_.width;
    float* sum = ThreadArena().Take<float>((1 + SumDepth(pieces_)) * size);
    ReadCount read;
    SumInOrder(0, TreeWidth(pieces_), pieces_, size, sum, sum + size, AllLeaves(),
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
  const Activations<W>* x = PrepareRows<W>(a.x, a.batch * a.tokens, a.width, a.int4_digits, arena, parallel);
  return ManyRows<W>(a, x, wanted, arena, parallel).Run(arena, parallel);
}

template <class W>
ReadCount Run(const FfnArgs& given, const Parallel& parallel) {
  FfnArgs a = given;
  const size_t rows = a.batch * a.tokens;
  a.residual = a.norm.scale == nullptr ? nullptr : a.x;
  // A block of more neurons than there are is one of them all; lists are sized by blocks.
  a.block = std::min(a.block, std::max<size_t>(a.neurons, 1));
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
