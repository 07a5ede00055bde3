// SPDX-License-Identifier: Apache-2.0
// SparseAttention: list the active heads, project queries (active heads) and keys and values (all, or active
// heads) into the cache, attend, then y = bo + the sum of context * wot.
#include "attend.cuh"
#include "gather_dot.cuh"
#include "gather_sum.cuh"

namespace shadowc {
namespace {

struct ProjectArgs {
  Chunk chunk;
  int tokens, width, heads, head_size,
      all_heads;  // all_heads: keys and values of heads that are not active too
  const ListedUnit* list;
  const TileCount* counts;
  const void *x, *wq, *wk, *wv;
  const float *scales, *bqkv;
  Positions positions;
  float* query;       // [chunk rows, E], scaled by 1 / sqrt(D)
  void *key, *value;  // act [B,H,T,D]
};

// One row of wq, wk or wv.
struct WeightRow {
  int part, head, d;  // part: 0 query, 1 key, 2 value
  unsigned rows;
};

// Position p among the rows to project: the queries of the listed heads, then keys, then values.
__device__ inline WeightRow weight_row(const ProjectArgs& a, int tile, int listed, int p) {
  const ListedUnit* list = a.list + static_cast<size_t>(tile) * a.heads;
  const int others = a.all_heads ? a.heads * a.head_size : listed;
  const int part = p < listed ? 0 : 1 + (p - listed) / others;
  const int within = p < listed ? p : (p - listed) % others;
  const int place = within / a.head_size, d = within % a.head_size;
  if (part > 0 && a.all_heads) return {part, place, d, (1u << a.chunk.tile) - 1};
  return {part, static_cast<int>(list[place].unit), d, list[place].rows};
}

template <class X>
__device__ inline void store_projection(const ProjectArgs& a, int chunk_row, const WeightRow& w, float sum) {
  const size_t scale = (static_cast<size_t>(w.head) * 4 + w.part) * a.head_size + w.d;
  const size_t bias = (static_cast<size_t>(w.head) * 3 + w.part) * a.head_size + w.d;
  const float result = sum * a.scales[scale] + a.bqkv[bias];
  if (w.part == 0) {
    const size_t at = static_cast<size_t>(chunk_row) * a.width + w.head * a.head_size + w.d;
    a.query[at] = result / sqrtf(static_cast<float>(a.head_size));
    return;
  }
  const int row = a.chunk.first + chunk_row, b = row / a.tokens, slot = a.positions.slot(b, row % a.tokens);
  if (slot >= a.positions.capacity) return;
  const size_t at =
      ((static_cast<size_t>(b) * a.heads + w.head) * a.positions.capacity + slot) * a.head_size + w.d;
  static_cast<X*>(w.part == 1 ? a.key : a.value)[at] = from_float<X>(result);
}

template <class X, class W, int V, int R>
__global__ void __launch_bounds__(kDotWarps* kWarp, R == 16 ? 1 : 2) project(const ProjectArgs a) {
  constexpr int N = kRecords<V, R>;
  const int tile = blockIdx.y, listed = a.counts[tile].members;
  const int count = listed + 2 * (a.all_heads ? a.heads * a.head_size : listed);
  const int position = (blockIdx.x * kDotWarps + threadIdx.x / kWarp) * N;
  if (position >= count) return;
  WeightRow rows[N];
  const W* w[N];
  unsigned any = 0;
  const int here = min(a.chunk.tile, a.chunk.rows - tile * a.chunk.tile);
  const unsigned present = (1u << here) - 1;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    rows[n] = weight_row(a, tile, listed, min(position + n, count - 1));
    rows[n].rows &= present;
    any |= rows[n].rows;
    const void* matrix = rows[n].part == 0 ? a.wq : rows[n].part == 1 ? a.wk : a.wv;
    w[n] = static_cast<const W*>(matrix) +
           (static_cast<size_t>(rows[n].head) * a.head_size + rows[n].d) * a.width;
  }
  const size_t first_row = a.chunk.first + tile * R;
  float results[kResults<V, R>] = {};
  gather_dot<X, W, V, R>(static_cast<const X*>(a.x) + first_row * a.width, any, w, a.width / V, results);
  for_results<V, R>(results, [&](int n, int r, float result) {
    WeightRow mine = rows[0];
#pragma unroll
    for (int i = 1; i < N; ++i) mine = n == i ? rows[i] : mine;
    if (position + n < count && (mine.rows >> r & 1) != 0) store_projection<X>(a, tile * R + r, mine, result);
  });
}

template <class X, class W, int V, int R>
int launch_project(const ProjectArgs& a, cudaStream_t stream) {
  const dim3 grid(cut(3 * a.width, kDotWarps * kRecords<V, R>), a.chunk.tiles);
  SHADOWC_LAUNCH((project<X, W, V, R>), grid, kDotWarps * kWarp, stream, a);
  return SHADOWC_OK;
}

template <class X, class W>
int launch_project_of(const ProjectArgs& a, cudaStream_t stream) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(W));
  if (!is_wide(a.width, sizeof(W))) return launch_project<X, W, 1, 16>(a, stream);
  switch (a.chunk.tile) {
    case 1:
      return launch_project<X, W, kWide, 1>(a, stream);
    case 4:
      return launch_project<X, W, kWide, 4>(a, stream);
    default:
      return launch_project<X, W, kWide, 16>(a, stream);
  }
}

struct CopyArgs {
  Positions positions;
  int heads, head_size, tokens;  // tokens: slots behind past that are kept too
  const void *from_key, *from_value;
  void *to_key, *to_value;
};

// Slots start ... past (+ tokens) of one head, for callers that did not bind one buffer as past and present.
template <class Word>
__global__ void __launch_bounds__(256) copy_prefix(const CopyArgs a, int words) {
  const int b = blockIdx.y / a.heads;
  const int begin = a.positions.first(b), end = min(a.positions.slot(b, a.tokens), a.positions.capacity);
  const size_t head = static_cast<size_t>(blockIdx.y) * a.positions.capacity;
  const size_t last = (head + max(begin, end)) * words, step = gridDim.x * blockDim.x;
  for (size_t i = (head + begin) * words + blockIdx.x * blockDim.x + threadIdx.x; i < last; i += step) {
    if (a.from_key != a.to_key) static_cast<Word*>(a.to_key)[i] = static_cast<const Word*>(a.from_key)[i];
    if (a.from_value != a.to_value)
      static_cast<Word*>(a.to_value)[i] = static_cast<const Word*>(a.from_value)[i];
  }
}

void copy_cache(const shadowc_attention& t, const Positions& positions, cudaStream_t stream) {
  if (t.past_key == t.present_key && t.past_value == t.present_value) return;
  const CopyArgs copy{positions,  t.heads,      t.head_size,   t.kv_active ? t.tokens : 0,
                      t.past_key, t.past_value, t.present_key, t.present_value};
  const int bytes = t.head_size * size_of(t.act);
  const dim3 grid(std::min(16, cut(t.capacity, 32)), t.batch * t.heads);
  if (bytes % 16 == 0) {
    SHADOWC_LAUNCH((copy_prefix<uint4>), grid, 256, stream, copy, bytes / 16);
  } else if (bytes % 4 == 0) {
    SHADOWC_LAUNCH((copy_prefix<unsigned>), grid, 256, stream, copy, bytes / 4);
  } else {
    SHADOWC_LAUNCH((copy_prefix<uint16_t>), grid, 256, stream, copy, bytes / 2);
  }
}

struct Buffers {
  unsigned* bits;
  ListedUnit* list;
  TileCount* counts;
  float *query, *coefficients, *attend, *partial;
};

Buffers divide(const shadowc_attention& t, Workspace* workspace) {
  const int all_rows = t.batch * t.tokens, rows = padded_rows(all_rows, is_wide(t.hidden, size_of(t.weight)));
  const size_t tiles = cut(rows, SHADOWC_TILE_ROWS), values = static_cast<size_t>(rows) * t.hidden;
  Buffers b;
  b.bits = workspace->take<unsigned>(tiles * t.heads);
  b.list = workspace->take<ListedUnit>(tiles * t.heads);
  b.counts = workspace->take<TileCount>(tiles);
  b.query = workspace->take<float>(values);
  b.coefficients = workspace->take<float>(values);
  b.attend = workspace->take<float>(attend_partial_size(rows, t.heads, t.head_size, t.capacity));
  b.partial = workspace->take<float>(sum_partial_size(t.weight, t.hidden, all_rows));
  return b;
}

// Per row of a head record: one weight row and one scale in each of 4 (active) or 2 (keys and values only)
// parts.
ReadRule read_rule(const shadowc_attention& t) {
  const long long part = static_cast<long long>(t.hidden) * size_of(t.weight) + sizeof(float);
  return {t.kv_active ? -1 : t.heads, 0, 4 * part, t.kv_active ? 0 : 2 * part, 0};
}

SumArgs sum_args(const shadowc_attention& t, const Chunk& chunk, const Buffers& b) {
  SumArgs sum = {};
  sum.act = t.act, sum.weight = t.weight;
  sum.chunk = chunk, sum.width = t.hidden;
  sum.block = t.head_size, sum.members = t.hidden;
  sum.list = b.list, sum.counts = b.counts, sum.units = t.heads;
  sum.w = t.wot, sum.scales = t.scales;
  sum.unit_stride = 4 * t.head_size, sum.first = 3 * t.head_size, sum.member_stride = 1;
  sum.coefficients = b.coefficients;
  sum.partial = b.partial, sum.bias = t.bo, sum.y = t.y;
  sum.rule = read_rule(t), sum.read = t.read;
  sum.start = t.start, sum.past = t.past;
  sum.batch = t.batch, sum.tokens = t.tokens, sum.capacity = t.capacity;
  return sum;
}

int run_chunk(const shadowc_attention& t, const Chunk& chunk, const Positions& positions, const Buffers& b,
              cudaStream_t stream) {
  list_units({t.mask, t.tokens, chunk, t.head_size, t.hidden, read_rule(t), b.bits, b.list, b.counts},
             stream);
  const ProjectArgs projection{chunk,    t.tokens, t.hidden,  t.heads, t.head_size,   !t.kv_active,
                               b.list,   b.counts, t.x,       t.wq,    t.wk,          t.wv,
                               t.scales, t.bqkv,   positions, b.query, t.present_key, t.present_value};
  with_type(t.act, [&](auto act) {
    using X = std::remove_pointer_t<decltype(act)>;
    if constexpr (!std::is_same_v<X, int8_t>) {
      if (t.weight == SHADOWC_I8) return launch_project_of<X, int8_t>(projection, stream);
      return launch_project_of<X, X>(projection, stream);
    }
    return static_cast<int>(SHADOWC_BAD_TYPE);
  });
  attend({t.act, t.mask, t.tokens, chunk, t.heads, t.head_size, positions, b.query, t.present_key,
          t.present_value, t.context, b.coefficients, b.attend},
         stream);
  return gather_sum(sum_args(t, chunk, b), stream);
}

}  // namespace
}  // namespace shadowc

int shadowc_attention_check(const shadowc_attention* args) {
  using namespace shadowc;
  const shadowc_attention& t = *args;
  if (t.batch < 1 || t.tokens < 0 || t.heads < 1 || t.head_size < 1 || t.capacity < 1)
    return SHADOWC_BAD_SIZE;
  if (t.head_size > SHADOWC_MAX_HEAD_SIZE) return SHADOWC_BAD_HEAD;
  if (static_cast<double>(t.heads) * t.head_size != t.hidden) return SHADOWC_BAD_SIZE;
  if (!fits_int(static_cast<double>(t.batch) * t.tokens) || !fits_int(4.0 * t.hidden) ||
      !fits_int(static_cast<double>(t.capacity) + t.tokens) ||
      static_cast<double>(t.batch) * t.heads > 65535) {
    return SHADOWC_BAD_SIZE;
  }
  if (const int status = check_types(t.act, t.weight)) return status;
  return check_mask(t.mask, t.batch, t.tokens, t.heads);
}

size_t shadowc_attention_workspace(const shadowc_attention* args) {
  if (shadowc_attention_check(args) != SHADOWC_OK) return 0;
  shadowc::Workspace workspace(nullptr);
  shadowc::divide(*args, &workspace);
  return workspace.used();
}

int shadowc_attention_enqueue(const shadowc_attention* args, void* memory, cudaStream_t stream) {
  using namespace shadowc;
  if (const int status = shadowc_attention_check(args)) return status;
  const shadowc_attention& t = *args;
  const int rows = t.batch * t.tokens;
  if (!usable(t.past_key, t.past_value, t.present_key, t.present_value, t.start, t.past))
    return SHADOWC_BAD_POINTER;
  if (rows > 0 && !usable(t.x, t.wq, t.wk, t.wv, t.wot, t.scales, t.bqkv, t.bo, t.y, memory)) {
    return SHADOWC_BAD_POINTER;
  }
  if (t.mask.tail > 0 && !usable(t.mask.scores, t.mask.threshold)) return SHADOWC_BAD_POINTER;
  const Positions positions{t.start, t.past, t.capacity};
  copy_cache(t, positions, stream);
  if (rows == 0 && t.read != nullptr) clear_read(t.read, stream);
  Workspace workspace(memory);
  const Buffers buffers = divide(t, &workspace);
  const bool wide = is_wide(t.hidden, size_of(t.weight));
  for (int first = 0; first < rows; first += SHADOWC_CHUNK_ROWS) {
    run_chunk(t, chunk_at(first, rows, wide), positions, buffers, stream);
  }
  return static_cast<int>(cudaGetLastError());
}
