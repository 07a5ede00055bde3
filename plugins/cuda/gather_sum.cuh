// SPDX-License-Identifier: Apache-2.0
// y[r] = bias + the sum over the members m of a tile's list of coefficient[m][r] * scale[m] * w[m]: the
// second half of both sparse operators (m is a neuron or a context element, w is w2t or wot).
#pragma once

#include "unit_list.cuh"

namespace shadowc {

struct SumArgs {
  shadowc_dtype act, weight;
  Chunk chunk;
  int width;  // E
  int block, members;
  const ListedUnit* list;
  TileCount* counts;
  int units;            // stride of list
  const void* w;        // weight [members, E]
  const float* scales;  // of member o of unit u: scales[u * unit_stride + first + o * member_stride]
  int unit_stride, first, member_stride;
  const float* coefficients;  // [tiles, members, tile]
  int skip_zeros;
  float* partial;  // sum_partial_size(...) floats
  const float* bias;
  void* y;  // act [all rows, E]
  ReadRule rule;
  int64_t* read;  // or null
  // Attention only (null otherwise): positions that make `read` (-1, -1) when they do not fit.
  const int64_t *start, *past;
  int batch, tokens, capacity;
};

// Floats that `partial` must hold; never fewer for more rows.
size_t sum_partial_size(shadowc_dtype weight, int width, int all_rows);

int gather_sum(const SumArgs& args, cudaStream_t stream);

// For calls without rows: read = (0, 0).
void clear_read(int64_t* read, cudaStream_t stream);

}  // namespace shadowc
