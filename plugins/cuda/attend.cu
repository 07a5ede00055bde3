// SPDX-License-Identifier: Apache-2.0
// A block takes one head of one row and up to kSpan slots. Inside a warp, a group of lanes takes one slot at
// a time (each lane 16 bytes of key and value) and keeps a running maximum, sum and weighted value; groups,
// warps and, if the cache is longer than kSpan, blocks are merged in a fixed order.
#include "attend.cuh"

#include "numbers.cuh"

namespace shadowc {
namespace {

constexpr int kAttendWarps = 8;
constexpr int kSpan = 256;      // slots per block
constexpr int kSlotsAhead = 4;  // slots per group that are loaded before the first is used

int spans_of(int capacity) { return cut(capacity, kSpan); }

// A lane's part of a head vector. V > 1: V consecutive elements, V * sizeof(T) = 16. V = 1: every 32nd
// element.
template <class T, int V>
struct HeadSlice {
  static constexpr int kElements = V == 1 ? SHADOWC_MAX_HEAD_SIZE / kWarp : V;
  float at[kElements];

  static __device__ int element(int lane_in_group, int i) {
    return V == 1 ? lane_in_group + kWarp * i : lane_in_group * V + i;
  }
};

template <class T, int V>
struct RawSlice {
  static constexpr int kParts = V == 1 ? HeadSlice<T, V>::kElements : 1;
  Packed<T, V> parts[kParts];
};

template <class T, int V>
__device__ inline RawSlice<T, V> load_slice(const T* vector, int lane, int size, bool wanted) {
  RawSlice<T, V> raw;
#pragma unroll
  for (int i = 0; i < RawSlice<T, V>::kParts; ++i) {
    const int d = HeadSlice<T, V>::element(lane, i);
    raw.parts[i] = wanted && d < size ? load<T, V>(vector + d) : zeros<T, V>();
  }
  return raw;
}

template <class T, int V>
__device__ inline HeadSlice<T, V> to_floats(const RawSlice<T, V>& raw) {
  HeadSlice<T, V> slice;
  if constexpr (V == 1) {
#pragma unroll
    for (int i = 0; i < RawSlice<T, V>::kParts; ++i) slice.at[i] = to_float(raw.parts[i].value);
  } else {
    unpack<T, V>(raw.parts[0], slice.at);
  }
  return slice;
}

// A softmax under way: the largest logit, the sum of exp(logit - most), and the values weighted with the
// same.
template <int N>
struct Running {
  float most, sum, value[N];
};

// What a part's numbers are to be multiplied with when the largest logit is `most`. A part without slots has
// sum 0; NaN in its sum must stay.
__device__ inline float rescale(float part_most, float part_sum, float most) {
  return part_sum == 0.0f ? 0.0f : expf(part_most - most);
}

// Adds kSlotsAhead slots of one group.
template <class T, int V, int N>
__device__ inline void add_slots(const HeadSlice<T, V>& query, const RawSlice<T, V> (&keys)[kSlotsAhead],
                                 const RawSlice<T, V> (&values)[kSlotsAhead], const bool (&seen)[kSlotsAhead],
                                 int group_width, Running<N>* run) {
  float logits[kSlotsAhead];
  float most = run->most;
#pragma unroll
  for (int u = 0; u < kSlotsAhead; ++u) {
    const HeadSlice<T, V> key = to_floats<T, V>(keys[u]);
    float logit = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) logit = fmaf(query.at[i], key.at[i], logit);
    for (int offset = group_width / 2; offset > 0; offset /= 2)
      logit += __shfl_xor_sync(kAllLanes, logit, offset);
    logits[u] = logit;
    if (seen[u]) most = fmaxf(most, logit);  // drops NaN, which then shows in the sum
  }
  const float keep = rescale(run->most, run->sum, most);
  run->sum *= keep;
#pragma unroll
  for (int i = 0; i < N; ++i) run->value[i] *= keep;
#pragma unroll
  for (int u = 0; u < kSlotsAhead; ++u) {
    if (!seen[u]) continue;
    const HeadSlice<T, V> value = to_floats<T, V>(values[u]);
    const float share = expf(logits[u] - most);
    run->sum += share;
#pragma unroll
    for (int i = 0; i < N; ++i) run->value[i] = fmaf(share, value.at[i], run->value[i]);
  }
  run->most = most;
}

// Merges the groups of a warp: afterwards the first group holds all.
template <int N>
__device__ inline void merge_groups(int group_width, Running<N>* run) {
  for (int offset = group_width; offset < kWarp; offset *= 2) {
    const float other_most = __shfl_xor_sync(kAllLanes, run->most, offset);
    const float other_sum = __shfl_xor_sync(kAllLanes, run->sum, offset);
    const float most = fmaxf(run->most, other_most);
    const float mine = rescale(run->most, run->sum, most), others = rescale(other_most, other_sum, most);
    run->sum = run->sum * mine + other_sum * others;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, run->value[i], offset);
      run->value[i] = run->value[i] * mine + other * others;
    }
    run->most = most;
  }
}

// The place of one head of one row in the outputs.
struct Place {
  int row, head;  // row of the chunk
  __device__ void store(const AttendArgs& a, int d, float value) const {
    const int width = a.heads * a.head_size, at = head * a.head_size + d;
    const int tile = row / a.chunk.tile, r = row % a.chunk.tile;
    a.coefficients[(static_cast<size_t>(tile) * width + at) * a.chunk.tile + r] = value;
    if (a.context == nullptr) return;
    const size_t out = static_cast<size_t>(a.chunk.first + row) * width + at;
    if (a.act == SHADOWC_F32) static_cast<float*>(a.context)[out] = value;
    if (a.act == SHADOWC_F16) static_cast<__half*>(a.context)[out] = from_float<__half>(value);
    if (a.act == SHADOWC_BF16) static_cast<__nv_bfloat16*>(a.context)[out] = from_float<__nv_bfloat16>(value);
  }
  // Of this head's partial results of one span: value [D], most, sum.
  __device__ float* partial(const AttendArgs& a, int span, int spans) const {
    const size_t index = (static_cast<size_t>(row) * a.heads + head) * spans + span;
    return a.partial + index * (a.head_size + 2);
  }
};

// Adds up parts (value [D], most, sum, `stride` floats apart) for element d; 0 if there is no slot in any.
struct Merged {
  float most, sum, value;
};
__device__ inline Merged merge_parts(const float* part, int parts, int stride, int size, int d) {
  Merged all = {-INFINITY, 0.0f, 0.0f};
  for (int p = 0; p < parts; ++p) all.most = fmaxf(all.most, part[p * stride + size]);
  for (int p = 0; p < parts; ++p) {
    const float* one = part + p * stride;
    const float factor = rescale(one[size], one[size + 1], all.most);
    all.sum += one[size + 1] * factor;
    all.value += one[d] * factor;
  }
  return all;
}

__device__ inline float quotient(const Merged& all) { return all.sum == 0.0f ? 0.0f : all.value / all.sum; }

// A lane's part of the query.
template <class T, int V>
__device__ inline HeadSlice<T, V> query_slice(const float* query, int lane, int size) {
  HeadSlice<T, V> slice;
#pragma unroll
  for (int i = 0; i < HeadSlice<T, V>::kElements; ++i) {
    const int d = HeadSlice<T, V>::element(lane, i);
    slice.at[i] = d < size ? query[d] : 0.0f;
  }
  return slice;
}

// What each group sees of slots begin ... stop - 1 of one head; the groups of the block take turns.
template <class T, int V, int N>
__device__ inline Running<N> see_slots(const HeadSlice<T, V>& query, const T* key, const T* value, int size,
                                       int begin, int stop, int group_width) {
  const int in_group = threadIdx.x % group_width, group = threadIdx.x / group_width;
  const int groups = kAttendWarps * kWarp / group_width;
  Running<N> run = {-INFINITY, 0.0f, {}};
  for (int base = begin; base < stop; base += groups * kSlotsAhead) {
    RawSlice<T, V> keys[kSlotsAhead], values[kSlotsAhead];
    bool seen[kSlotsAhead];
#pragma unroll
    for (int u = 0; u < kSlotsAhead; ++u) {
      const int slot = base + u * groups + group;
      seen[u] = slot < stop;
      keys[u] = load_slice<T, V>(key + static_cast<size_t>(slot) * size, in_group, size, seen[u]);
      values[u] = load_slice<T, V>(value + static_cast<size_t>(slot) * size, in_group, size, seen[u]);
    }
    add_slots<T, V, N>(query, keys, values, seen, group_width, &run);
  }
  return run;
}

// The first group of a warp writes what the warp has seen: value [D], most, sum.
template <class T, int V, int N>
__device__ inline void store_part(const Running<N>& run, int group_width, int size, float* part) {
  const int lane = threadIdx.x % kWarp;
  if (lane >= group_width) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int d = HeadSlice<T, V>::element(lane, i);
    if (d < size) part[d] = run.value[i];
  }
  if (lane != 0) return;
  part[size] = run.most;
  part[size + 1] = run.sum;
}

template <class T, int V>
__global__ void __launch_bounds__(kAttendWarps* kWarp)
    attend_span(const AttendArgs a, int spans, int group_width) {
  constexpr int N = HeadSlice<T, V>::kElements, kStride = SHADOWC_MAX_HEAD_SIZE + 2;
  SHADOWC_SHARED(float, parts, kAttendWarps* kStride);
  const Place place{static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.x)};
  const int span = blockIdx.y, row = a.chunk.first + place.row, b = row / a.tokens, size = a.head_size;
  if (!row_mask(a.mask, a.tokens, row).runs(place.head)) {
    for (int d = threadIdx.x; span == 0 && d < size; d += kAttendWarps * kWarp) place.store(a, d, 0.0f);
    return;
  }
  const int begin = a.positions.first(b) + span * kSpan, end = a.positions.end(b, row % a.tokens);
  if (span > 0 && begin >= end) return;

  const size_t cache = (static_cast<size_t>(b) * a.heads + place.head) * a.positions.capacity * size;
  const float* vector = a.query + (static_cast<size_t>(place.row) * a.heads + place.head) * size;
  const auto query = query_slice<T, V>(vector, threadIdx.x % group_width, size);
  Running<N> run =
      see_slots<T, V, N>(query, static_cast<const T*>(a.key) + cache, static_cast<const T*>(a.value) + cache,
                         size, begin, min(end, begin + kSpan), group_width);
  merge_groups<N>(group_width, &run);
  store_part<T, V, N>(run, group_width, size, parts + threadIdx.x / kWarp * kStride);
  __syncthreads();

  const int d = threadIdx.x;
  if (d >= size) return;
  const Merged all = merge_parts(parts, kAttendWarps, kStride, size, d);
  if (spans == 1) {
    place.store(a, d, quotient(all));
    return;
  }
  float* out = place.partial(a, span, spans);
  out[d] = all.value;
  if (d == 0) {
    out[size] = all.most;
    out[size + 1] = all.sum;
  }
}

__global__ void __launch_bounds__(SHADOWC_MAX_HEAD_SIZE) merge_spans(const AttendArgs a, int spans) {
  const Place place{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x)};
  const int row = a.chunk.first + place.row, b = row / a.tokens, d = threadIdx.x;
  if (d >= a.head_size || !row_mask(a.mask, a.tokens, row).runs(place.head)) return;
  const int slots = a.positions.end(b, row % a.tokens) - a.positions.first(b);
  const int used = max(1, (slots + kSpan - 1) / kSpan);
  place.store(a, d, quotient(merge_parts(place.partial(a, 0, spans), used, a.head_size + 2, a.head_size, d)));
}

template <class T, int V>
void launch_attend(const AttendArgs& a, int group_width, cudaStream_t stream) {
  const int spans = spans_of(a.positions.capacity);
  const dim3 grid(a.heads, spans, a.chunk.rows);
  SHADOWC_LAUNCH((attend_span<T, V>), grid, kAttendWarps * kWarp, stream, a, spans, group_width);
  if (spans == 1) return;
  SHADOWC_LAUNCH(merge_spans, dim3(a.heads, a.chunk.rows), SHADOWC_MAX_HEAD_SIZE, stream, a, spans);
}

}  // namespace

size_t attend_partial_size(int padded_rows, int heads, int head_size, int capacity) {
  const size_t spans = spans_of(capacity);
  return spans == 1 ? 0 : spans * padded_rows * heads * (head_size + 2);
}

int attend(const AttendArgs& a, cudaStream_t stream) {
  return with_type(a.act, [&](auto act) {
    using T = std::remove_pointer_t<decltype(act)>;
    if constexpr (std::is_same_v<T, int8_t>) {
      return static_cast<int>(SHADOWC_BAD_TYPE);
    } else {
      constexpr int V = 16 / static_cast<int>(sizeof(T));
      int width = 1;  // lanes per slot, a power of two
      while (width * V < a.head_size) width *= 2;
      if (a.head_size % V == 0) {
        launch_attend<T, V>(a, width, stream);
      } else {
        launch_attend<T, 1>(a, kWarp, stream);
      }
      return static_cast<int>(SHADOWC_OK);
    }
  });
}

}  // namespace shadowc
