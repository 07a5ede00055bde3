// SPDX-License-Identifier: Apache-2.0
#include "attention_panels.h"

#include "panel_rows.h"

namespace shadowc {
namespace {

constexpr size_t kPanelsAtOnce = 16;
constexpr size_t kDepthAtOnce = 1024;  // of out_proj: two woven columns of tiles fill 32 KiB of L1

struct Projection {
  const PanelKernels& kernels;
  const AttentionArgs& a;
  WeightTable rows_of;
  const uint32_t* masks;
  const Panels& x;
  const uint8_t* left;
  float query_factor;
  float* query;

  bool Wants(size_t part, size_t row, size_t h) const {
    const bool active = (masks[row / kTileRows * a.heads + h] >> row % kTileRows & 1) != 0;
    return left[row] == 0 && (active || (part != 0 && !a.kv_active_only));
  }
  bool Float16(size_t part) const { return part != 0 && a.cache == CacheType::kFloat16; }
  // Those of panel p, bit r: row r.
  uint16_t WantedRows(size_t part, size_t p, size_t h) const {
    uint16_t wanted = 0;
    for (size_t r = 0; r < kPanelRows; ++r) {
      const size_t row = p * kPanelRows + r;
      const bool wants = row < a.batch * a.tokens && Wants(part, row, h);
      wanted = static_cast<uint16_t>(wanted | unsigned{wants} << r);
    }
    return wanted;
  }
  // Where value d of a row's query, key or value goes.
  void* Target(size_t part, size_t row, size_t h, size_t d) const {
    if (part == 0) return query + row * a.width + h * a.head_size + d;
    const size_t batch = row / a.tokens, slot = static_cast<size_t>(a.past[batch]) + row % a.tokens;
    const size_t place = ((batch * a.heads + h) * a.capacity + slot) * a.head_size + d;
    return static_cast<std::byte*>(part == 1 ? a.present_key : a.present_value) + place * BytesOf(a.cache);
  }
};

// Rows d0 ... d0 + count - 1 of one part of one head, for the panels in which any row has a use for it.
void Project32(const Projection& projection, size_t h, size_t part, size_t d0, size_t count, size_t p0,
               size_t p1, const DotsRoom& room) {
  const AttentionArgs& a = projection.a;
  WeightRow rows[kMostRowsOfDots];
  float scale[kMostRowsOfDots];
  const size_t first = (h * 4 + part) * a.head_size + d0;
  for (size_t i = 0; i < count; ++i) {
    rows[i] = projection.rows_of.Row(first + i);
    scale[i] = rows[i].factor;
  }
  const RowDots dots(projection.kernels, projection.x, rows, count, a.width, room);
  const std::byte* next[kMostRowsOfDots];
  const size_t next_count = std::min(kMostRowsOfDots, a.head_size - d0 - count);
  for (size_t i = 0; i < next_count; ++i) next[i] = projection.rows_of.Values(first + count + i);
  const LaterRows later{next, next_count, LaterBytes(projection.rows_of.RowBytes(), projection.x.steps)};
  const float* bias = a.bqkv + (h * 3 + part) * a.head_size + d0;
  const float factor = part == 0 ? projection.query_factor : 1.0f;
  const auto wanted = [&](size_t p) { return projection.WantedRows(part, p, h); };
  void* out[kPanelRows];
  dots.ForPanels(p0, p1, later, wanted, [&](size_t p, uint16_t rows_wanted, size_t i) -> DotsTarget {
    for (size_t r = 0; r < kPanelRows; ++r) {
      const bool is_wanted = (rows_wanted >> r & 1) != 0;
      out[r] = is_wanted ? projection.Target(part, p * kPanelRows + r, h, d0 + i) : nullptr;
    }
    const size_t here = std::min<size_t>(16, count - i);
    return {scale + i, bias + i, factor, false, nullptr, out, projection.Float16(part), here, nullptr};
  });
}

}  // namespace

bool SplitForProjection(const PanelKernels& kernels, const AttentionArgs& a, const Panels& x, uint8_t* left,
                        const Parallel& parallel) {
  const size_t rows = a.batch * a.tokens, room = PanelsOf(rows) * kPanelRows;
  std::fill(left, left + room, uint8_t{0});
  SplitRows(kernels, a.x, a.width, nullptr, rows, a.width, RowDots::IsByQuad(kernels), x, left, parallel);
  return std::any_of(left, left + rows, [](uint8_t row) { return row != 0; });
}

void ProjectPanels(const PanelKernels& kernels, const AttentionArgs& a, const uint32_t* masks,
                   const Panels& x, const uint8_t* left, float query_factor, float* query,
                   const Parallel& parallel) {
  const WeightTable rows_of(kernels, a.type, a.w, a.scales, a.width);
  const Projection projection{kernels, a, rows_of, masks, x, left, query_factor, query};
  const size_t panels = PanelsOf(a.batch * a.tokens), groups = (panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
  const size_t parts = a.heads * 3;
  parallel.For(parts * groups, [&](size_t task) {
    const size_t h = task % parts / 3, part = task % 3;
    const size_t p0 = task / parts * kPanelsAtOnce, p1 = std::min(panels, p0 + kPanelsAtOnce);
    const size_t rows = a.batch * a.tokens;
    bool used = false;
    for (size_t row = p0 * kPanelRows; row < std::min(rows, p1 * kPanelRows) && !used; ++row) {
      used = projection.Wants(part, row, h);
    }
    if (!used) return;  // its weights are not read either
    const DotsRoom room(x);
    const PanelScope scope(kernels);
    for (size_t d = 0; d < a.head_size; d += kMostRowsOfDots) {
      Project32(projection, h, part, d, std::min(kMostRowsOfDots, a.head_size - d), p0, p1, room);
    }
  });
}

bool ProjectOutPanels(const PanelKernels& kernels, const AttentionArgs& a, const uint32_t* masks,
                      CallArena* arena, uint8_t* left, const Parallel& parallel) {
  const size_t rows = a.batch * a.tokens, panels = PanelsOf(rows), tiles = (rows + kTileRows - 1) / kTileRows;
  const size_t depth = std::min(a.width, kDepthAtOnce);
  Panels context = TakePanels(kernels, arena, panels, depth, a.rounding);
  const WeightTable rows_of(kernels, a.type, a.w, a.scales, a.width);
  float* scale = arena->Take<float>(a.width);
  WeightRow* records = arena->Take<WeightRow>(a.width);
  for (size_t h = 0; h < a.heads; ++h) {
    bool any = false;
    for (size_t t = 0; t < tiles; ++t) any |= masks[t * a.heads + h] != 0;
    for (size_t d = 0; d < a.head_size; ++d) {
      const size_t k = h * a.head_size + d;
      records[k] = rows_of.Row((h * 4 + 3) * a.head_size + d);
      scale[k] = records[k].factor;
      if (!any) records[k].values = nullptr;
    }
  }
  std::fill(left, left + panels * kPanelRows, uint8_t{0});
  for (size_t k = 0; k < a.width; k += depth) {
    const size_t here = std::min(depth, a.width - k);
    context.steps = StepsOf(kernels, here);
    SplitRows(kernels, a.context + k, a.width, scale + k, rows, here, false, context, left, parallel);
    AddWeightRows(kernels, context, records + k, here, k == 0 ? a.bo : nullptr, rows, a.width, left, a.y,
                  parallel);
  }
  AddResidual(a.residual, rows, a.width, left, a.y, parallel);
  return std::all_of(left, left + rows, [](uint8_t row) { return row == 0; });
}

}  // namespace shadowc
