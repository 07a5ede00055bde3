// SPDX-License-Identifier: Apache-2.0
// Products of the rows of a tile with rows of a matrix: one warp takes kRecords matrix rows at a time, its
// lanes share their width. Each weight is loaded once and used for all R rows of x (which come from L1).
#pragma once

#include "numbers.cuh"

namespace shadowc {

constexpr int kDotWarps = 8;

// Matrix rows that a warp takes at once: enough loads in flight with one row of x, reuse of x with many, and
// no more than registers hold.
constexpr int records(int V, int R) { return V == 1 ? 1 : R == 1 || V == 16 || (R == 16 && V == 4) ? 2 : 4; }
template <int V, int R>
constexpr int kRecords = records(V, R);

// Loads per matrix row that are issued before the first is used.
template <int R>
constexpr int kDepth = R == 1   ? 4
                       : R == 4 ? 2
                                : 1;

// Results n * R + r of a warp: each is kept by lane (n * R + r) % 32, in place (n * R + r) / 32.
template <int V, int R>
constexpr int kResults = (kRecords<V, R> * R + kWarp - 1) / kWarp;

// results = x[r] . w[n] for the rows r in `rows`. x [R, width], w[n] [width], width = vectors * V. The sum of
// a product is formed in an order that depends on width and V alone.
template <class X, class W, int V, int R>
__device__ inline void gather_dot(const X* x, unsigned rows, const W* const (&w)[kRecords<V, R>], int vectors,
                                  float (&results)[kResults<V, R>]) {
  constexpr int N = kRecords<V, R>, U = kDepth<R>;
  const int lane = threadIdx.x % kWarp, width = vectors * V;
  float sums[N][R] = {};
  for (int at = lane; at < vectors; at += kWarp * U) {
    Packed<W, V> packed[U][N];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int v = at + u * kWarp;
#pragma unroll
      for (int n = 0; n < N; ++n) packed[u][n] = v < vectors ? load_once<W, V>(w[n] + v * V) : zeros<W, V>();
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int v = at + u * kWarp;
      if (v >= vectors) break;
      float weights[N][V];
#pragma unroll
      for (int n = 0; n < N; ++n) unpack<W, V>(packed[u][n], weights[n]);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (R > 1 && (rows >> r & 1) == 0) continue;
        float values[V];
        unpack<X, V>(load<X, V>(x + static_cast<size_t>(r) * width + v * V), values);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int i = 0; i < V; ++i) sums[n][r] = fmaf(values[i], weights[n][i], sums[n][r]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float sum = warp_sum(sums[n][r]);
      if (lane == (n * R + r) % kWarp) results[(n * R + r) / kWarp] = sum;
    }
  }
}

// Calls store(n, r, result) once for each of the N * R results, spread over the lanes.
template <int V, int R, class F>
__device__ inline void for_results(const float (&results)[kResults<V, R>], F&& store) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kResults<V, R>; ++k) {
    const int i = k * kWarp + lane;
    if (i < kRecords<V, R> * R) store(i / R, i % R, results[k]);
  }
}

}  // namespace shadowc
