// SPDX-License-Identifier: Apache-2.0
// Neurons go by in blocks. Of each block: dot products of all rows with the fc1 halves, the hidden values as
// panels, sums of the fc2 halves into y. A neuron that no row computes is left out; where some rows compute
// it, the hidden values of the others are 0, and add exactly nothing. Blocks are cut by neuron, not by what
// is computed, so a row has the same digits and sums whatever its neighbours leave out. (Sums of floats
// depend on the place of a neuron in its block too. But they are for calls with tokens that are not masked
// (Rounding), where every neuron is computed.)
//
// The weights pass once for all rows, but `read` counts as documented (types.h): once per tile of rows that
// has a use for them.
#include "ffn_panels.h"

#include "panel_rows.h"

namespace shadowc {
namespace {

// Many neurons: few additions to y. Few: hidden values of 512 rows stay in L2.
constexpr size_t kBlock = 1024;
constexpr size_t kNeuronsAtOnce = 64, kPanelsAtOnce = 8;

struct Work {
  const PanelKernels& kernels;
  const FfnArgs& a;
  WeightTable rows_of;  // row 2 f and row 2 f + 1: the halves of neuron f
  size_t rows, tiles;
  uint32_t* masks;    // [tiles, units]
  uint32_t* neurons;  // [count] those that any row computes
  size_t count;

  uint16_t MaskOf(size_t p, size_t f) const {
    const uint32_t tile = masks[p * kPanelRows / kTileRows * a.selection.units + f / a.block];
    return static_cast<uint16_t>(tile >> p * kPanelRows % kTileRows);
  }
};

// The listed ones of kBlock neurons.
struct Block {
  const uint32_t* neurons;
  size_t count, stride;
  float* hidden;      // [panels * kPanelRows, stride]
  uint16_t* fired;    // [panels, kBlock], bit r: row r of the panel has a value that is not 0
  WeightRow* second;  // [kBlock] fc2 halves
};

void MakeMasks(Work* work, const Parallel& parallel) {
  const FfnArgs& a = work->a;
  const size_t units = a.selection.units;
  parallel.For(work->tiles, [&](size_t t) {
    TileMasks(a.selection, a.tokens, t * kTileRows, std::min(kTileRows, work->rows - t * kTileRows),
              work->masks + t * units);
  });
  for (size_t f = 0; f < a.neurons; ++f) {
    uint32_t any = 0;
    for (size_t t = 0; t < work->tiles; ++t) any |= work->masks[t * units + f / a.block];
    work->neurons[work->count] = static_cast<uint32_t>(f);
    work->count += any != 0;
  }
}

// Adds the fc2 halves that will be read of the at most 32 neurons up to block.neurons[n], whose hidden values
// of panels p0 ... p1 - 1 are there.
size_t HalvesBefore(const Work& work, const Block& block, size_t p0, size_t p1, size_t n, size_t count,
                    const std::byte** list) {
  size_t found = 0;
  for (size_t i = n - count; i < n; ++i) {
    bool used = !work.a.skip_zeros;
    for (size_t p = p0; p < p1 && !used; ++p) used = block.fired[p * kBlock + i] != 0;
    if (used) list[found++] = work.rows_of.Values(2 * block.neurons[i] + 1);
  }
  return found;
}

// Hidden values of panels p0 ... p1 - 1 for at most 32 neurons, the first of which is block.neurons[n].
// Meanwhile the fc1 halves of the next 32 are fetched, and the fc2 halves of the `before` ones in front.
void Hidden32(const Work& work, const Block& block, const Panels& x, size_t p0, size_t p1, size_t n,
              size_t before, size_t count, const DotsRoom& room) {
  const FfnArgs& a = work.a;
  const uint32_t* list = block.neurons + n;
  WeightRow rows[kMostRowsOfDots];
  float scale[kMostRowsOfDots], bias[kMostRowsOfDots];
  for (size_t i = 0; i < count; ++i) {
    rows[i] = work.rows_of.Row(2 * list[i]);
    scale[i] = rows[i].factor;
    bias[i] = a.b1[list[i]];
    if (p0 == 0) block.second[n + i] = work.rows_of.Row(2 * list[i] + 1);
  }
  const RowDots dots(work.kernels, x, rows, count, a.width, room);
  const std::byte* next[2 * kMostRowsOfDots];
  size_t next_count = std::min(kMostRowsOfDots, block.count - n - count);
  for (size_t i = 0; i < next_count; ++i) next[i] = work.rows_of.Values(2 * list[count + i]);
  next_count += HalvesBefore(work, block, p0, p1, n, before, next + next_count);
  const LaterRows later{next, next_count, LaterBytes(work.rows_of.RowBytes(), x.steps)};
  const auto hidden_of = [&](size_t p, size_t r) {
    return block.hidden + (p * kPanelRows + r) * block.stride + n;
  };
  const auto all_after_fetching = [&](size_t p) {
    for (size_t r = 0; r < kPanelRows; ++r) FetchRow(hidden_of(p, r), count);
    return RowDots::AllRows(p);
  };
  uint16_t mask[16];
  void* out[kPanelRows];
  dots.ForPanels(p0, p1, later, all_after_fetching, [&](size_t p, uint16_t, size_t i0) -> DotsTarget {
    for (size_t i = i0; i < std::min(count, i0 + 16); ++i) mask[i - i0] = work.MaskOf(p, list[i]);
    for (size_t r = 0; r < kPanelRows; ++r) out[r] = hidden_of(p, r) + i0;
    uint16_t* fired = block.fired + p * kBlock + n + i0;
    return {scale + i0, bias + i0, 1.0f, true, mask, out, false, std::min<size_t>(16, count - i0), fired};
  });
}

void FirstLayer(const Work& work, const Block& block, const Panels& x, const Parallel& parallel) {
  const size_t panels = PanelsOf(work.rows), groups = (panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
  const size_t parts = (block.count + kNeuronsAtOnce - 1) / kNeuronsAtOnce;
  parallel.For(groups * parts, [&](size_t task) {
    const size_t p0 = task / parts * kPanelsAtOnce, p1 = std::min(panels, p0 + kPanelsAtOnce);
    const size_t first = task % parts * kNeuronsAtOnce, last = std::min(block.count, first + kNeuronsAtOnce);
    const DotsRoom room(x);
    const PanelScope scope(work.kernels);
    for (size_t n = first; n < last; n += kMostRowsOfDots) {
      const size_t before = std::min(kMostRowsOfDots, n - first);
      Hidden32(work, block, x, p0, p1, n, before, std::min(kMostRowsOfDots, last - n), room);
    }
  });
}

// How many neurons of the block have a use for their fc2 half, tile by tile; any[n]: in some tile.
size_t SecondHalves(const Work& work, const Block& block, uint8_t* any) {
  size_t halves = 0;
  for (size_t n = 0; n < block.count; ++n) {
    const size_t f = block.neurons[n];
    any[n] = 0;
    for (size_t t = 0; t < work.tiles; ++t) {
      uint32_t used = work.masks[t * work.a.selection.units + f / work.a.block];
      if (work.a.skip_zeros && used != 0) {
        const size_t p = t * (kTileRows / kPanelRows);
        used = block.fired[p * kBlock + n];
        if ((p + 1) * kPanelRows < work.rows) used |= block.fired[(p + 1) * kBlock + n];
      }
      any[n] |= used != 0;
      halves += used != 0;
    }
  }
  return halves;
}

}  // namespace

bool FfnPanels(const PanelKernels& kernels, const FfnArgs& a, CallArena* arena, const Parallel& parallel,
               uint8_t* left, ReadCount* read) {
  const size_t rows = a.batch * a.tokens, panels = PanelsOf(rows), tiles = (rows + kTileRows - 1) / kTileRows;
  Work work{kernels,
            a,
            WeightTable(kernels, a.type, a.w, a.scales, a.width),
            rows,
            tiles,
            arena->Take<uint32_t>(tiles * a.selection.units),
            arena->Take<uint32_t>(a.neurons + 1),
            0};
  MakeMasks(&work, parallel);
  std::fill(left, left + panels * kPanelRows, uint8_t{0});
  const Panels x = TakePanels(kernels, arena, panels, a.width, a.rounding);
  Panels hidden = TakePanels(kernels, arena, panels, kBlock, a.rounding);
  SplitRows(kernels, a.x, a.width, nullptr, rows, a.width, RowDots::IsByQuad(kernels), x, left, parallel);
  // Rows that are a power of two apart would share cache sets.
  Block block{work.neurons,
              0,
              kBlock + 16,
              nullptr,
              arena->Take<uint16_t>(panels * kBlock),
              arena->Take<WeightRow>(kBlock)};
  block.hidden = arena->Take<float>(panels * kPanelRows * block.stride);
  float* scale = arena->Take<float>(kBlock);
  uint8_t* any = arena->Take<uint8_t>(kBlock);
  const uint32_t* const end = work.neurons + work.count;
  size_t halves = 0;
  for (size_t first = 0; first < a.neurons; first += kBlock, block.neurons += block.count) {
    block.count = static_cast<size_t>(std::lower_bound(block.neurons, end, first + kBlock) - block.neurons);
    if (block.count == 0) continue;
    FirstLayer(work, block, x, parallel);
    halves += SecondHalves(work, block, any);
    for (size_t n = 0; n < block.count; ++n) {
      scale[n] = block.second[n].factor;
      if (any[n] == 0) block.second[n].values = nullptr;
    }
    hidden.steps = StepsOf(kernels, block.count);
    SplitRows(kernels, block.hidden, block.stride, scale, rows, block.count, false, hidden, left, parallel);
    const bool is_first = block.neurons == work.neurons;
    AddWeightRows(kernels, hidden, block.second, block.count, is_first ? a.b2 : nullptr, rows, a.width, left,
                  a.y, parallel);
  }
  for (size_t r = 0; work.count == 0 && r < rows; ++r) std::copy(a.b2, a.b2 + a.width, a.y + r * a.width);
  AddResidual(a.residual, rows, a.width, left, a.y, parallel);
  size_t touched = 0;
  for (size_t f = 0; f < a.neurons; ++f) {
    for (size_t t = 0; t < tiles; ++t) touched += work.masks[t * a.selection.units + f / a.block] != 0;
  }
  *read = {static_cast<int64_t>(touched),
           static_cast<int64_t>((touched + halves) * work.rows_of.ReadBytes())};
  return std::all_of(left, left + rows, [](uint8_t row) { return row == 0; });
}

}  // namespace shadowc
