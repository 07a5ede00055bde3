// SPDX-License-Identifier: Apache-2.0
// Two kernels. The first cuts the columns into strips of 32 lanes and the list into splits of kSumWarps
// warps; each warp adds up the members at its positions of the list, and the block adds up its warps. The
// second adds the splits, in their order, to the bias.
#include "gather_sum.cuh"

#include "numbers.cuh"

namespace shadowc {
namespace {

constexpr int kSumWarps = 8;
constexpr int kFinishThreads = 128;
constexpr int kTargetBlocks = 320;  // some blocks for each multiprocessor of the largest cards
constexpr int kLeastPerWarp = 4;    // list positions; fewer are not worth a split
constexpr int kMostSplits = 64;

// Columns per lane: 16 bytes, unless R rows of them do not fit into registers.
template <class W, int R>
constexpr int kColumns = R == 16 && sizeof(W) == 1 ? 8 : 16 / static_cast<int>(sizeof(W));

// Members whose weights are loaded before the first is used.
template <int R>
constexpr int kAhead = R == 1   ? 8
                       : R == 4 ? 4
                                : 2;

__device__ inline int splits_used(int members, int splits) {
  const int useful = (members + kSumWarps * kLeastPerWarp - 1) / (kSumWarps * kLeastPerWarp);
  return min(splits, useful);
}

template <int R>
__device__ inline bool all_zero(const float* coefficients, int rows) {
  bool zero = true;
#pragma unroll
  for (int r = 0; r < R; ++r) zero = zero && (r >= rows || coefficients[r] == 0.0f);
  return zero;
}

// What a lane knows of one position of the list.
struct Member {
  int index;
  float scale, coefficient;  // coefficient: only of a tile of one row, scaled
  bool wanted;
};

template <int R>
__device__ inline Member member_at(const SumArgs& a, int tile, int p, int count, int rows,
                                   const float* coefficients) {
  if (p >= count) return {0, 0.0f, 0.0f, false};
  const unsigned unit = unit_at(a.list + static_cast<size_t>(tile) * a.units, p, a.block).unit;
  const int o = p % a.block, index = static_cast<int>(unit) * a.block + o;
  const float scale = a.scales[static_cast<size_t>(unit) * a.unit_stride + a.first + o * a.member_stride];
  const float* mine = coefficients + static_cast<size_t>(index) * R;
  const bool wanted = !a.skip_zeros || !all_zero<R>(mine, rows);
  return {index, scale, R == 1 ? mine[0] * scale : 0.0f, wanted};
}

// sums += the members of `lanes` (one bit per lane that holds one), kAhead at a time, lowest lane first.
template <class W, int V, int R>
__device__ inline void add_members(const W* column, bool inside, int width, const Member& held,
                                   unsigned lanes, int rows, const float* coefficients, float (&sums)[R][V]) {
  constexpr int U = kAhead<R>;
  while (lanes != 0) {
    int source[U];
    Packed<W, V> packed[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      source[u] = __ffs(static_cast<int>(lanes)) - 1;  // -1: no more
      lanes &= lanes - 1;
      const int index = __shfl_sync(kAllLanes, held.index, max(source[u], 0));
      const bool loads = inside && source[u] >= 0;
      packed[u] = loads ? load_once<W, V>(column + static_cast<size_t>(index) * width) : zeros<W, V>();
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (source[u] < 0) break;
      float weights[V];
      unpack<W, V>(packed[u], weights);
      const float scale = __shfl_sync(kAllLanes, R == 1 ? held.coefficient : held.scale, source[u]);
      const float* row =
          coefficients + static_cast<size_t>(__shfl_sync(kAllLanes, held.index, source[u])) * R;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float factor = R == 1 ? scale : r < rows ? row[r] * scale : 0.0f;
        if (R > 1 && factor == 0.0f) continue;  // the row does not use it
#pragma unroll
        for (int i = 0; i < V; ++i) sums[r][i] = fmaf(factor, weights[i], sums[r][i]);
      }
    }
  }
}

template <class W, int V, int R>
__global__ void __launch_bounds__(kSumWarps* kWarp, R == 16 ? 1 : 2)
    sum_members(const SumArgs a, int splits) {
  constexpr int kPitch = kWarp + 1;  // lanes of one column lie side by side
  SHADOWC_SHARED(float, strip, kSumWarps * V * kPitch);
  const int tile = blockIdx.z, split = blockIdx.y, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int count = a.counts[tile].members, used = splits_used(count, splits);
  if (split >= used) return;
  const int rows = min(a.chunk.tile, a.chunk.rows - tile * a.chunk.tile),
            first = (blockIdx.x * kWarp + lane) * V;
  const float* coefficients = a.coefficients + static_cast<size_t>(tile) * a.members * R;
  const W* column = static_cast<const W*>(a.w) + first;

  float sums[R][V] = {};
  int second = 0;
  const int step = used * kSumWarps;
  for (int p = split * kSumWarps + warp; p < count; p += kWarp * step) {
    const Member held = member_at<R>(a, tile, p + lane * step, count, rows, coefficients);
    const unsigned lanes = __ballot_sync(kAllLanes, held.wanted);
    second += __popc(lanes);
    add_members<W, V, R>(column, first < a.width, a.width, held, lanes, rows, coefficients, sums);
  }
  if (a.skip_zeros && blockIdx.x == 0 && lane == 0) atomicAdd(&a.counts[tile].second, second);

  float* out = a.partial + (static_cast<size_t>(split) * a.chunk.tiles + tile) * R * a.width;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= rows) break;
#pragma unroll
    for (int i = 0; i < V; ++i) strip[(warp * V + i) * kPitch + lane] = sums[r][i];
    __syncthreads();
    for (int c = threadIdx.x; c < V * kWarp; c += kSumWarps * kWarp) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kSumWarps; ++w) sum += strip[(w * V + c % V) * kPitch + c / V];
      const int e = blockIdx.x * kWarp * V + c;
      if (e < a.width) out[static_cast<size_t>(r) * a.width + e] = sum;
    }
    __syncthreads();
  }
}

__device__ inline bool positions_fit(const SumArgs& a) {
  for (int b = 0; b < a.batch; ++b) {
    const int64_t start = a.start[b], past = a.past[b];
    if (past < 0 || past > a.capacity - a.tokens || start < 0 || start > past + a.tokens) return false;
  }
  return true;
}

__device__ void report_read(const SumArgs& a) {
  if (a.past != nullptr && !positions_fit(a)) {
    a.read[0] = a.read[1] = -1;
    return;
  }
  long long records = a.chunk.first == 0 ? 0 : a.read[0], bytes = a.chunk.first == 0 ? 0 : a.read[1];
  for (int t = 0; t < a.chunk.tiles; ++t) {
    records += a.counts[t].records;
    bytes += a.counts[t].bytes + a.counts[t].second * a.rule.second_bytes;
  }
  a.read[0] = records;
  a.read[1] = bytes;
}

template <class Act>
__global__ void __launch_bounds__(kFinishThreads) finish_sum(const SumArgs a, int splits) {
  const int e = blockIdx.x * kFinishThreads + threadIdx.x, row = blockIdx.y;
  if (a.read != nullptr && row == 0 && e == 0) report_read(a);
  if (e >= a.width) return;
  const int tile = row / a.chunk.tile, used = splits_used(a.counts[tile].members, splits);
  const size_t stride = static_cast<size_t>(a.chunk.tiles) * a.chunk.tile * a.width;
  const float* partial = a.partial + static_cast<size_t>(row) * a.width + e;
  float sum = 0.0f;
#pragma unroll 8
  for (int s = 0; s < used; ++s) sum += partial[s * stride];
  static_cast<Act*>(a.y)[static_cast<size_t>(a.chunk.first + row) * a.width + e] =
      from_float<Act>(a.bias[e] + sum);
}

__global__ void clear(int64_t* read) { read[0] = read[1] = 0; }

int strips_of(int width, int columns) { return cut(width, columns * kWarp); }

int splits_of(int strips, int tiles) {
  return std::min(kMostSplits, std::max(1, cut(kTargetBlocks, strips * tiles)));
}

int columns_of(shadowc_dtype weight, int tile, bool wide) {
  if (!wide) return 1;
  return tile == 16 && weight == SHADOWC_I8 ? kColumns<int8_t, 16> : 16 / size_of(weight);
}

template <class W, int V, int R>
int launch_sum(const SumArgs& a, int strips, int splits, cudaStream_t stream) {
  SHADOWC_LAUNCH((sum_members<W, V, R>), dim3(strips, splits, a.chunk.tiles), kSumWarps * kWarp, stream, a,
                 splits);
  return SHADOWC_OK;
}

template <class W>
int launch_sum_of(const SumArgs& a, bool wide, int strips, int splits, cudaStream_t stream) {
  if (!wide) return launch_sum<W, 1, 16>(a, strips, splits, stream);
  switch (a.chunk.tile) {
    case 1:
      return launch_sum<W, kColumns<W, 1>, 1>(a, strips, splits, stream);
    case 4:
      return launch_sum<W, kColumns<W, 4>, 4>(a, strips, splits, stream);
    default:
      return launch_sum<W, kColumns<W, 16>, 16>(a, strips, splits, stream);
  }
}

}  // namespace

size_t sum_partial_size(shadowc_dtype weight, int width, int all_rows) {
  const bool wide = is_wide(width, size_of(weight));
  size_t most = 0;
  for (int rows = 1; rows <= std::min(SHADOWC_CHUNK_ROWS, all_rows); ++rows) {
    const Chunk chunk = chunk_at(0, rows, wide);
    const int splits = splits_of(strips_of(width, columns_of(weight, chunk.tile, wide)), chunk.tiles);
    most = std::max(most, static_cast<size_t>(splits) * chunk.tiles * chunk.tile * width);
  }
  return most;
}

int gather_sum(const SumArgs& a, cudaStream_t stream) {
  const bool wide = is_wide(a.width, size_of(a.weight));
  const int strips = strips_of(a.width, columns_of(a.weight, a.chunk.tile, wide));
  const int splits = splits_of(strips, a.chunk.tiles);
  with_type(a.weight, [&](auto weight) {
    return launch_sum_of<std::remove_pointer_t<decltype(weight)>>(a, wide, strips, splits, stream);
  });
  return with_type(a.act, [&](auto act) {
    using Act = std::remove_pointer_t<decltype(act)>;
    if constexpr (!std::is_same_v<Act, int8_t>) {
      const dim3 grid(cut(a.width, kFinishThreads), a.chunk.rows);
      SHADOWC_LAUNCH((finish_sum<Act>), grid, kFinishThreads, stream, a, splits);
    }
    return SHADOWC_OK;
  });
}

void clear_read(int64_t* read, cudaStream_t stream) { SHADOWC_LAUNCH(clear, 1, 1, stream, read); }

}  // namespace shadowc
