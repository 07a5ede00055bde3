// SPDX-License-Identifier: Apache-2.0
// The projections of SparseAttention over many rows in panels (panels.h).
#pragma once

#include "arena.h"
#include "panels.h"
#include "sparse_attention.h"

namespace shadowc {

// masks [tiles of kTileRows rows, heads] as TileMasks makes them. `left` has room for a whole number of
// panels.

// Splits the rows of x; left[row] says which have no digits. True if there are any.
bool SplitForProjection(const PanelKernels& kernels, const AttentionArgs& args, const Panels& x,
                        uint8_t* left, const Parallel& parallel);

// Queries (scaled by query_factor, [rows, E]), keys and values of the rows that are not left.
void ProjectPanels(const PanelKernels& kernels, const AttentionArgs& args, const uint32_t* masks,
                   const Panels& x, const uint8_t* left, float query_factor, float* query,
                   const Parallel& parallel);

// y from context; false if there are rows without digits (left[row]), whose y is then unwritten.
bool ProjectOutPanels(const PanelKernels& kernels, const AttentionArgs& args, const uint32_t* masks,
                      CallArena* arena, uint8_t* left, const Parallel& parallel);

}  // namespace shadowc
