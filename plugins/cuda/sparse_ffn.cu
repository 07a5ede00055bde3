// SPDX-License-Identifier: Apache-2.0
// SparseFFN: list the active neurons, hidden = relu(w1 x + b1) for those, then y = b2 + the sum of hidden *
// w2t.
#include "gather_dot.cuh"
#include "gather_sum.cuh"

namespace shadowc {
namespace {

struct HiddenArgs {
  Chunk chunk;
  int width, neurons, block, units;
  const ListedUnit* list;
  const TileCount* counts;
  const void *x, *w1;
  const float *scales, *b1;
  float* hidden;  // [tiles, F, tile]; 0 for the rows of a tile that do not compute a listed neuron
};

// One warp for kRecords listed neurons.
template <class X, class W, int V, int R>
__global__ void __launch_bounds__(kDotWarps* kWarp, R == 16 ? 1 : 2) hidden_of_listed(const HiddenArgs a) {
  constexpr int N = kRecords<V, R>;
  const int tile = blockIdx.y, count = a.counts[tile].members;
  const int position = (blockIdx.x * kDotWarps + threadIdx.x / kWarp) * N;
  if (position >= count) return;
  const ListedUnit* list = a.list + static_cast<size_t>(tile) * a.units;
  const W* w[N];
  int neurons[N];
  unsigned rows[N], any = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int p = min(position + n, count - 1);
    const ListedUnit listed = unit_at(list, p, a.block);
    neurons[n] = static_cast<int>(listed.unit) * a.block + p % a.block;
    rows[n] = listed.rows;
    any |= listed.rows;
    w[n] = static_cast<const W*>(a.w1) + static_cast<size_t>(neurons[n]) * a.width;
  }
  const size_t first_row = a.chunk.first + tile * R;
  float results[kResults<V, R>] = {};
  gather_dot<X, W, V, R>(static_cast<const X*>(a.x) + first_row * a.width, any, w, a.width / V, results);
  float* hidden = a.hidden + static_cast<size_t>(tile) * a.neurons * R;
  for_results<V, R>(results, [&](int n, int r, float result) {
    if (position + n >= count) return;
    int neuron = neurons[0];
    unsigned needed = rows[0];
#pragma unroll
    for (int i = 1; i < N; ++i) {
      neuron = n == i ? neurons[i] : neuron;
      needed = n == i ? rows[i] : needed;
    }
    const float sum = result * a.scales[2 * static_cast<size_t>(neuron)] + a.b1[neuron];
    const float fired = sum < 0.0f ? 0.0f : sum;  // NaN stays
    hidden[static_cast<size_t>(neuron) * R + r] = (needed >> r & 1) != 0 ? fired : 0.0f;
  });
}

template <class X, class W, int V, int R>
int launch_hidden(const HiddenArgs& a, cudaStream_t stream) {
  const dim3 grid(cut(a.neurons, kDotWarps * kRecords<V, R>), a.chunk.tiles);
  SHADOWC_LAUNCH((hidden_of_listed<X, W, V, R>), grid, kDotWarps * kWarp, stream, a);
  return SHADOWC_OK;
}

template <class X, class W>
int launch_hidden_of(const HiddenArgs& a, cudaStream_t stream) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(W));
  if (!is_wide(a.width, sizeof(W))) return launch_hidden<X, W, 1, 16>(a, stream);
  switch (a.chunk.tile) {
    case 1:
      return launch_hidden<X, W, kWide, 1>(a, stream);
    case 4:
      return launch_hidden<X, W, kWide, 4>(a, stream);
    default:
      return launch_hidden<X, W, kWide, 16>(a, stream);
  }
}

// The parts of the workspace; null pointers when only counted.
struct Buffers {
  unsigned* bits;
  ListedUnit* list;
  TileCount* counts;
  float *hidden, *partial;
};

Buffers divide(const shadowc_ffn& f, Workspace* workspace) {
  const size_t units = f.mask.units;
  const int all_rows = f.batch * f.tokens, rows = padded_rows(all_rows, is_wide(f.hidden, size_of(f.weight)));
  const size_t tiles = cut(rows, SHADOWC_TILE_ROWS);
  Buffers b;
  b.bits = workspace->take<unsigned>(tiles * units);
  b.list = workspace->take<ListedUnit>(tiles * units);
  b.counts = workspace->take<TileCount>(tiles);
  b.hidden = workspace->take<float>(static_cast<size_t>(rows) * f.neurons);
  b.partial = workspace->take<float>(sum_partial_size(f.weight, f.hidden, all_rows));
  return b;
}

ReadRule read_rule(const shadowc_ffn& f) {
  const long long half = static_cast<long long>(f.hidden) * size_of(f.weight) + sizeof(float);
  return {-1, 1, f.skip_zeros ? half : 2 * half, 0, f.skip_zeros ? half : 0};
}

int run_chunk(const shadowc_ffn& f, const Chunk& chunk, const Buffers& b, cudaStream_t stream) {
  const int block = std::min(f.block, f.neurons);
  list_units({f.mask, f.tokens, chunk, block, f.neurons, read_rule(f), b.bits, b.list, b.counts}, stream);
  const HiddenArgs hidden{chunk,    f.hidden, f.neurons, block,    f.mask.units, b.list,
                          b.counts, f.x,      f.w1,      f.scales, f.b1,         b.hidden};
  with_type(f.act, [&](auto act) {
    using X = std::remove_pointer_t<decltype(act)>;
    if constexpr (!std::is_same_v<X, int8_t>) {
      if (f.weight == SHADOWC_I8) return launch_hidden_of<X, int8_t>(hidden, stream);
      return launch_hidden_of<X, X>(hidden, stream);
    }
    return static_cast<int>(SHADOWC_BAD_TYPE);
  });
  SumArgs sum = {};
  sum.act = f.act, sum.weight = f.weight;
  sum.chunk = chunk, sum.width = f.hidden;
  sum.block = block, sum.members = f.neurons;
  sum.list = b.list, sum.counts = b.counts, sum.units = f.mask.units;
  sum.w = f.w2t, sum.scales = f.scales;
  sum.unit_stride = 2 * block, sum.first = 1, sum.member_stride = 2;
  sum.coefficients = b.hidden, sum.skip_zeros = f.skip_zeros;
  sum.partial = b.partial, sum.bias = f.b2, sum.y = f.y;
  sum.rule = read_rule(f), sum.read = f.read;
  return gather_sum(sum, stream);
}

}  // namespace
}  // namespace shadowc

int shadowc_ffn_check(const shadowc_ffn* args) {
  using namespace shadowc;
  const shadowc_ffn& f = *args;
  if (f.batch < 1 || f.tokens < 0 || f.hidden < 1 || f.neurons < 1 || f.block < 1) return SHADOWC_BAD_SIZE;
  if (!fits_int(static_cast<double>(f.batch) * f.tokens) || !fits_int(2.0 * f.neurons + f.block)) {
    return SHADOWC_BAD_SIZE;
  }
  if (const int status = check_types(f.act, f.weight)) return status;
  return check_mask(f.mask, f.batch, f.tokens, f.neurons / f.block + (f.neurons % f.block != 0));
}

size_t shadowc_ffn_workspace(const shadowc_ffn* args) {
  if (shadowc_ffn_check(args) != SHADOWC_OK) return 0;
  shadowc::Workspace workspace(nullptr);
  shadowc::divide(*args, &workspace);
  return workspace.used();
}

int shadowc_ffn_enqueue(const shadowc_ffn* args, void* memory, cudaStream_t stream) {
  using namespace shadowc;
  if (const int status = shadowc_ffn_check(args)) return status;
  const shadowc_ffn& f = *args;
  const int rows = f.batch * f.tokens;
  if (rows == 0) {
    if (f.read != nullptr) clear_read(f.read, stream);
    return static_cast<int>(cudaGetLastError());
  }
  if (!usable(f.x, f.w1, f.w2t, f.scales, f.b1, f.b2, f.y, memory)) return SHADOWC_BAD_POINTER;
  if (f.mask.tail > 0 && !usable(f.mask.scores, f.mask.threshold)) return SHADOWC_BAD_POINTER;
  Workspace workspace(memory);
  const Buffers buffers = divide(f, &workspace);
  const bool wide = is_wide(f.hidden, size_of(f.weight));
  for (int first = 0; first < rows; first += SHADOWC_CHUNK_ROWS) {
    run_chunk(f, chunk_at(first, rows, wide), buffers, stream);
  }
  return static_cast<int>(cudaGetLastError());
}
