// SPDX-License-Identifier: Apache-2.0
// One block per tile. Each warp goes over its own stretch of units twice, once to count and once to write,
// with a single exchange of counts between: the order is that of the units, whatever warp is first.
#include "unit_list.cuh"

namespace shadowc {
namespace {

constexpr int kWarps = 16;

__device__ inline unsigned rows_that_run(const RowMask* masks, int rows, int unit) {
  unsigned bits = 0;
  for (int r = 0; r < rows; ++r) bits |= static_cast<unsigned>(masks[r].runs(unit)) << r;
  return bits;
}

__device__ TileCount tile_count(const ListArgs& a, int units, bool has_last) {
  const int missing = a.mask.units * a.block - a.members;  // of the last unit
  TileCount count = {};
  count.units = units;
  count.members = units * a.block - (has_last ? missing : 0);
  const int listed = a.rule.member_is_record ? count.members : count.units;
  count.records = a.rule.fixed_records >= 0 ? a.rule.fixed_records : listed;
  count.bytes = count.members * a.rule.listed_bytes + (a.members - count.members) * a.rule.other_bytes;
  return count;
}

__global__ void __launch_bounds__(kWarps* kWarp) list_tile(const ListArgs a) {
  SHADOWC_SHARED(RowMask, masks, SHADOWC_TILE_ROWS);
  SHADOWC_SHARED(int, found, kWarps);
  const int tile = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = tile * a.chunk.tile, rows = min(a.chunk.tile, a.chunk.rows - first), units = a.mask.units;
  if (static_cast<int>(threadIdx.x) < rows)
    masks[threadIdx.x] = row_mask(a.mask, a.tokens, a.chunk.first + first + threadIdx.x);
  __syncthreads();

  unsigned* bits = a.bits + static_cast<size_t>(tile) * units;
  ListedUnit* list = a.list + static_cast<size_t>(tile) * units;
  const int stretch = (units + kWarps * kWarp - 1) / (kWarps * kWarp) * kWarp;
  const int begin = warp * stretch, end = min(units, begin + stretch);
  int count = 0;
  for (int base = begin; base < end; base += kWarp) {
    const int unit = base + lane;
    const unsigned needed = unit < end ? rows_that_run(masks, rows, unit) : 0;
    if (unit < end) bits[unit] = needed;
    count += __popc(__ballot_sync(kAllLanes, needed != 0));
  }
  if (lane == 0) found[warp] = count;
  __syncthreads();

  int place = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    place += w < warp ? found[w] : 0;
    all += found[w];
  }
  for (int base = begin; base < end; base += kWarp) {
    const int unit = base + lane;
    const unsigned needed = unit < end ? bits[unit] : 0;
    const unsigned lanes = __ballot_sync(kAllLanes, needed != 0);
    if (needed != 0) list[place + __popc(lanes & ((1u << lane) - 1))] = {static_cast<unsigned>(unit), needed};
    place += __popc(lanes);
  }
  if (threadIdx.x == 0) a.counts[tile] = tile_count(a, all, bits[units - 1] != 0);
}

}  // namespace

void list_units(const ListArgs& args, cudaStream_t stream) {
  SHADOWC_LAUNCH(list_tile, args.chunk.tiles, kWarps * kWarp, stream, args);
}

}  // namespace shadowc
