// SPDX-License-Identifier: Apache-2.0
// A radix select on order-preserving integer keys, 11 + 11 + 10 bits: each histogram narrows the k-th largest
// down to one bin. Local scope: a block per row and layer does all. Global scope: the blocks of a row's
// layers add their histograms up in global memory (integers: any order gives the same), one launch per
// histogram.
#include "numbers.cuh"
#include "workspace.cuh"

namespace shadowc {
namespace {

constexpr int kThreads = 512;
constexpr int kBins = 2048;
constexpr int kPasses = 3;
constexpr int kCopies = 4;         // of a block's histogram: scores cluster, and increments of one bin wait
constexpr int kPitch = kBins + 8;  // copies of a bin lie in different banks
constexpr int kPerThread = kBins / kThreads;

struct SelectArgs {
  int tail, layers, units, min_active, density_batch, first_row;
  unsigned long long exempt;  // bit per layer
  const float *scores, *density;
  float* threshold;
  int32_t* active;       // or null
  unsigned* histograms;  // [chunk rows, kPasses, kBins], global scope only

  __device__ bool is_exempt(int layer) const { return (exempt >> layer & 1) != 0; }
  __device__ const float* scores_of(int row, int layer) const {
    return scores + (static_cast<size_t>(row) * layers + layer) * units;
  }
};

// Larger scores have larger keys; NaN ranks as +inf. -0 ranks just below +0, which changes no comparison.
__device__ inline unsigned key_of(float score) {
  if (score != score) score = INFINITY;
  unsigned bits;
  memcpy(&bits, &score, sizeof bits);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ inline float score_of(unsigned key) {
  const unsigned bits = (key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// The key's bin in a pass, and the bits that earlier passes have settled.
__device__ inline unsigned bin_of(unsigned key, int pass) {
  return pass == 0 ? key >> 21 : pass == 1 ? key >> 10 & 2047u : key & 1023u;
}
__device__ inline unsigned settled(unsigned key, int pass) {
  return pass == 0 ? 0 : pass == 1 ? key >> 21 : key >> 10;
}
__device__ inline unsigned settle(unsigned prefix, int pass, unsigned bin) {
  return pass < 2 ? prefix << 11 | bin : prefix << 10 | bin;
}

// k of the row's n units, from its density; n * density is exact in double.
__device__ inline long long wanted(const SelectArgs& a, int row, long long n) {
  const float given = a.density[a.density_batch == 1 ? 0 : row / a.tail];
  double density = given != given ? 1.0 : static_cast<double>(given);
  density = density < 0.0 ? 0.0 : density > 1.0 ? 1.0 : density;
  const long long k = static_cast<long long>(floor(density * static_cast<double>(n) + 0.5));
  return k < n ? k : n;
}

// Shared memory of a block.
struct Scratch {
  unsigned* bins;    // [kCopies, kPitch]
  unsigned* warps;   // [kThreads / kWarp]
  unsigned* chosen;  // [2] bin, rank within it
};

__device__ inline void clear_bins(const Scratch& s) {
  for (int i = threadIdx.x; i < kCopies * kPitch; i += kThreads) s.bins[i] = 0;
  __syncthreads();
}

// Counts, in the block's bins, the keys whose settled bits are `prefix`.
__device__ inline void count_keys(const float* scores, int units, int pass, unsigned prefix,
                                  const Scratch& s) {
  unsigned* mine = s.bins + threadIdx.x % kCopies * kPitch;
#pragma unroll 4
  for (int i = threadIdx.x; i < units; i += kThreads) {
    const unsigned key = key_of(scores[i]);
    if (settled(key, pass) == prefix) atomicAdd(mine + bin_of(key, pass), 1u);
  }
  __syncthreads();
}

__device__ inline unsigned bin_sum(const Scratch& s, int bin) {
  unsigned sum = 0;
#pragma unroll
  for (int c = 0; c < kCopies; ++c) sum += s.bins[c * kPitch + bin];
  return sum;
}

// The bin that holds the k-th largest, counted from the highest bin down; *k becomes the rank within it.
// count(bin) is what a bin holds. All threads get the same.
template <class F>
__device__ unsigned find_bin(const Scratch& s, F&& count, unsigned* k) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp,
            top = kBins - 1 - threadIdx.x * kPerThread;
  unsigned mine[kPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sum += mine[i] = count(top - i);
  unsigned before = sum;  // inclusive sums over the warp
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned lower = __shfl_up_sync(kAllLanes, before, offset);
    before += lane >= offset ? lower : 0;
  }
  if (lane == kWarp - 1) s.warps[warp] = before;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += s.warps[w];
  before -= sum;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (before < *k && *k <= before + mine[i]) {  // one thread, one bin
      s.chosen[0] = top - i;
      s.chosen[1] = *k - before;
    }
    before += mine[i];
  }
  __syncthreads();
  *k = s.chosen[1];
  return s.chosen[0];  // stays until all threads are inside the next call
}

// The k-th largest of one layer, 1 <= k <= units.
__device__ float kth_largest(const float* scores, int units, unsigned k, const Scratch& s) {
  unsigned prefix = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    clear_bins(s);
    count_keys(scores, units, pass, prefix, s);
    prefix = settle(prefix, pass, find_bin(s, [&](int bin) { return bin_sum(s, bin); }, &k));
  }
  return score_of(prefix);
}

__device__ int count_active(const float* scores, int units, float threshold, const Scratch& s) {
  int count = 0;
  for (int i = threadIdx.x; i < units; i += kThreads) count += !(scores[i] < threshold);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) count += __shfl_xor_sync(kAllLanes, count, offset);
  if (threadIdx.x % kWarp == 0) s.warps[threadIdx.x / kWarp] = count;
  __syncthreads();
  count = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) count += static_cast<int>(s.warps[w]);
  return count;  // the next writer of s.warps waits for all threads first
}

// Applies exemption and min_active to one layer's threshold; writes both outputs.
__device__ void finish(const SelectArgs& a, int row, int layer, float threshold, const Scratch& s) {
  const float* scores = a.scores_of(row, layer);
  if (a.is_exempt(layer)) threshold = -INFINITY;
  int active = count_active(scores, a.units, threshold, s);
  const int least = min(a.min_active, a.units);
  if (active < least) {  // otherwise the least-th largest score is no smaller
    threshold = kth_largest(scores, a.units, static_cast<unsigned>(least), s);
    active = count_active(scores, a.units, threshold, s);
  }
  if (threadIdx.x != 0) return;
  const size_t at = static_cast<size_t>(row) * a.layers + layer;
  a.threshold[at] = threshold;
  if (a.active != nullptr) a.active[at] = active;
}

__global__ void __launch_bounds__(kThreads, 2) select_local(const SelectArgs a) {
  SHADOWC_SHARED(unsigned, bins, kCopies* kPitch);
  SHADOWC_SHARED(unsigned, warps, kThreads / kWarp);
  SHADOWC_SHARED(unsigned, chosen, 2);
  const Scratch s{bins, warps, chosen};
  const int row = blockIdx.x / a.layers, layer = blockIdx.x % a.layers;
  const long long k = wanted(a, row, a.units);
  float threshold = k == 0 ? INFINITY : -INFINITY;
  if (k > 0 && k < a.units && !a.is_exempt(layer)) {
    threshold = kth_largest(a.scores_of(row, layer), a.units, static_cast<unsigned>(k), s);
  }
  finish(a, row, layer, threshold, s);
}

// ---- global scope

__device__ inline long long ranked_units(const SelectArgs& a) {
  int layers = 0;
  for (int layer = 0; layer < a.layers; ++layer) layers += !a.is_exempt(layer);
  return static_cast<long long>(layers) * a.units;
}

// What the first `passes` histograms of a row say: the settled bits of the k-th largest key.
__device__ unsigned settled_by(const SelectArgs& a, int chunk_row, int passes, unsigned k, const Scratch& s) {
  unsigned prefix = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const unsigned* histogram = a.histograms + (static_cast<size_t>(chunk_row) * kPasses + pass) * kBins;
    prefix = settle(prefix, pass, find_bin(s, [&](int bin) { return histogram[bin]; }, &k));
  }
  return prefix;
}

__global__ void __launch_bounds__(kThreads) clear_histograms(unsigned* histograms, int size) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < size) histograms[i] = 0;
}

__global__ void __launch_bounds__(kThreads) count_layer(const SelectArgs a, int pass) {
  SHADOWC_SHARED(unsigned, bins, kCopies* kPitch);
  SHADOWC_SHARED(unsigned, warps, kThreads / kWarp);
  SHADOWC_SHARED(unsigned, chosen, 2);
  const Scratch s{bins, warps, chosen};
  const int layer = blockIdx.x, row = a.first_row + blockIdx.y;
  const long long n = ranked_units(a), k = wanted(a, row, n);
  if (a.is_exempt(layer) || k == 0 || k == n) return;
  const unsigned prefix = settled_by(a, blockIdx.y, pass, static_cast<unsigned>(k), s);
  clear_bins(s);
  count_keys(a.scores_of(row, layer), a.units, pass, prefix, s);
  unsigned* histogram = a.histograms + (static_cast<size_t>(blockIdx.y) * kPasses + pass) * kBins;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    const unsigned count = bin_sum(s, bin);
    if (count != 0) atomicAdd(histogram + bin, count);
  }
}

__global__ void __launch_bounds__(kThreads) finish_global(const SelectArgs a) {
  SHADOWC_SHARED(unsigned, bins, kCopies* kPitch);
  SHADOWC_SHARED(unsigned, warps, kThreads / kWarp);
  SHADOWC_SHARED(unsigned, chosen, 2);
  const Scratch s{bins, warps, chosen};
  const int row = a.first_row + blockIdx.y;
  const long long n = ranked_units(a), k = wanted(a, row, n);
  float threshold = k == 0 ? INFINITY : -INFINITY;
  if (k > 0 && k < n) threshold = score_of(settled_by(a, blockIdx.y, kPasses, static_cast<unsigned>(k), s));
  finish(a, row, blockIdx.x, threshold, s);
}

void select_global(SelectArgs a, int rows, cudaStream_t stream) {
  for (a.first_row = 0; a.first_row < rows; a.first_row += SHADOWC_CHUNK_ROWS) {
    const int here = std::min(SHADOWC_CHUNK_ROWS, rows - a.first_row), size = here * kPasses * kBins;
    SHADOWC_LAUNCH(clear_histograms, cut(size, kThreads), kThreads, stream, a.histograms, size);
    for (int pass = 0; pass < kPasses; ++pass) {
      SHADOWC_LAUNCH(count_layer, dim3(a.layers, here), kThreads, stream, a, pass);
    }
    SHADOWC_LAUNCH(finish_global, dim3(a.layers, here), kThreads, stream, a);
  }
}

}  // namespace
}  // namespace shadowc

int shadowc_select_check(const shadowc_select* args) {
  const shadowc_select& t = *args;
  if (t.batch < 1 || t.tail < 0 || t.layers < 1 || t.units < 1 || t.exempt_count < 0) return SHADOWC_BAD_SIZE;
  if (t.layers > SHADOWC_MAX_LAYERS || t.exempt_count > SHADOWC_MAX_LAYERS) return SHADOWC_BAD_LAYERS;
  if (!shadowc::fits_int(static_cast<double>(t.layers) * t.units) ||
      !shadowc::fits_int(static_cast<double>(t.batch) * t.tail * t.layers)) {
    return SHADOWC_BAD_SIZE;
  }
  return t.density_batch == 1 || t.density_batch == t.batch ? SHADOWC_OK : SHADOWC_BAD_BATCH;
}

size_t shadowc_select_workspace(const shadowc_select* args) {
  using namespace shadowc;
  if (shadowc_select_check(args) != SHADOWC_OK) return 0;
  const size_t rows =
      std::min<long long>(SHADOWC_CHUNK_ROWS, static_cast<long long>(args->batch) * args->tail);
  return args->global ? rows * kPasses * kBins * sizeof(unsigned) : 0;
}

int shadowc_select_enqueue(const shadowc_select* args, void* workspace, cudaStream_t stream) {
  using namespace shadowc;
  if (const int status = shadowc_select_check(args)) return status;
  const shadowc_select& t = *args;
  const int rows = t.batch * t.tail;
  if (rows == 0) return SHADOWC_OK;
  if (!usable(t.scores, t.density, t.threshold) || (t.exempt_count > 0 && t.exempt == nullptr)) {
    return SHADOWC_BAD_POINTER;
  }
  if (t.global && !usable(workspace)) return SHADOWC_BAD_POINTER;
  SelectArgs a = {};
  a.tail = t.tail, a.layers = t.layers, a.units = t.units;
  a.min_active = t.min_active, a.density_batch = t.density_batch;
  a.scores = t.scores, a.density = t.density, a.threshold = t.threshold, a.active = t.active;
  a.histograms = static_cast<unsigned*>(workspace);
  for (int i = 0; i < t.exempt_count; ++i) {
    if (t.exempt[i] >= 0 && t.exempt[i] < t.layers) a.exempt |= 1ull << t.exempt[i];
  }
  if (t.global) {
    select_global(a, rows, stream);
  } else {
    SHADOWC_LAUNCH(select_local, rows * t.layers, kThreads, stream, a);
  }
  return static_cast<int>(cudaGetLastError());
}
