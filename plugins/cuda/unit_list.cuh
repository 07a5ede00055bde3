// SPDX-License-Identifier: Apache-2.0
// From masks to lists: for each tile of rows, the units that any row needs, ascending, and which rows need
// them.
#pragma once

#include "launch.cuh"
#include "workspace.cuh"

namespace shadowc {

// A unit of the list: its index, and a bit for each row of the tile that computes it.
struct ListedUnit {
  unsigned unit, rows;
};

struct TileCount {
  int units;    // in the list
  int members;  // neurons, or rows of heads, in the list
  int second;   // members whose second half was read (skip_zeros); later kernels add to it
  int unused;
  long long records, bytes;  // what `read` reports, second halves of skip_zeros apart
};

// How members turn into `read`.
struct ReadRule {
  int fixed_records;                    // >= 0: this many whatever is listed; -1: those listed
  int member_is_record;                 // 1: count members (neurons); 0: count units (heads)
  long long listed_bytes, other_bytes;  // per member that is listed, and per member that is not
  long long second_bytes;               // per TileCount::second
};

struct ListArgs {
  shadowc_mask mask;
  int tokens;
  Chunk chunk;
  int block, members;  // members per unit (the last may have fewer), and of all units
  ReadRule rule;
  unsigned* bits;     // [tiles, units] scratch
  ListedUnit* list;   // [tiles, units]
  TileCount* counts;  // [tiles]
};

// Which units a row computes; null scores: all.
struct RowMask {
  const float* scores;
  float threshold;
  __device__ bool runs(int unit) const { return scores == nullptr || !(scores[unit] < threshold); }
};

__device__ inline RowMask row_mask(const shadowc_mask& mask, int tokens, int row) {
  const int b = mask.batch == 1 ? 0 : row / tokens, z = row % tokens - (tokens - mask.tail);
  if (z < 0) return {nullptr, 0.0f};
  const size_t at = (static_cast<size_t>(b) * mask.tail + z) * mask.layers + mask.layer;
  return {mask.scores + at * mask.units, mask.threshold[at]};
}

// The unit that position p of the members of a tile's list belongs to.
__device__ inline ListedUnit unit_at(const ListedUnit* list, int p, int block) { return list[p / block]; }

void list_units(const ListArgs& args, cudaStream_t stream);

}  // namespace shadowc
