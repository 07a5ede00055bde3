// SPDX-License-Identifier: Apache-2.0
// Softmax attention of single queries over the cache, for the active heads of a chunk of rows.
#pragma once

#include "unit_list.cuh"

namespace shadowc {

// The slots of each batch entry, clamped to the cache: whatever start and past hold, an index from here is
// inside.
struct Positions {
  const int64_t *start, *past;  // [B]
  int capacity;                 // T

  __device__ int clamp(int64_t slot) const {
    return slot < 0 ? 0 : slot > capacity ? capacity : static_cast<int>(slot);
  }
  __device__ int first(int b) const { return clamp(start[b]); }
  // Where new token s goes; T or more: nowhere.
  __device__ int slot(int b, int s) const { return clamp(past[b]) + s; }
  // One behind the last slot that new token s sees.
  __device__ int end(int b, int s) const { return min(slot(b, s) + 1, capacity); }
};

struct AttendArgs {
  shadowc_dtype act;
  shadowc_mask mask;
  int tokens;
  Chunk chunk;
  int heads, head_size;
  Positions positions;
  const float* query;       // [chunk rows, H*D], scaled
  const void *key, *value;  // act [B,H,T,D]
  void* context;            // act [all rows, H*D], or null
  float* coefficients;      // [tiles, H*D, tile]: the context in float
  float* partial;           // attend_partial_size(...) floats
};

size_t attend_partial_size(int padded_rows, int heads, int head_size, int capacity);

int attend(const AttendArgs& args, cudaStream_t stream);

}  // namespace shadowc
