// SPDX-License-Identifier: Apache-2.0
// SparseAttention: projections, causal attention over a fixed-capacity cache, output projection, over the
// active heads of each row.
//
// Shapes: x [B, S, E], w [H, 4, D, E] (query, key, value rows, then the out_proj columns: one head is one
// contiguous record), scales [H, 4, D] (int4, packed to [H, 4, D, E / 2]: [H, 4, D, E / 64]), bqkv [H, 3, D],
// bo [E], past_* and present_* [B, H, T, D], start, past [B], y and context [B, S, E]. H * D == E. Queries
// are scaled by 1/sqrt(D) after their bias.
//
// Token s of row b has slot past[b] + s and sees slots start[b] ... past[b] + s; with none to see its context
// is 0. An inactive head gets no query, no attention and no output rows, and context 0. Its key and value are
// still written, unless kv_active_only, which is legal only if a head's mask never changes within a
// generation. Slots outside start[b] ... past[b] + S - 1 take part in no arithmetic: they may hold NaN.
//
// The cache: present may be the same memory as past. If it is not, slots 0 ... past[b] - 1 are copied first
// (with kv_active_only up to past[b] + S - 1, because some of the new ones may not be written); later slots
// of present keep whatever the memory held. It is float32 or float16: attention reads what it has stored,
// and computes in float32.
//
// read.records: heads of which any part was read, per tile of rows (types.h). read.bytes: for each of the 4
// parts (query, key, value, output) that was read, D * E weights and their scales. So an inactive head costs
// half a record.
#pragma once

#include "parallel.h"
#include "types.h"

namespace shadowc {

enum class CacheType { kFloat32, kFloat16 };

constexpr size_t BytesOf(CacheType type) { return type == CacheType::kFloat16 ? 2 : 4; }

struct AttentionArgs {
  const float* x;
  Norm norm;
  size_t batch, tokens, width;
  Selection selection;
  WeightType type;
  const void* w;
  const float* scales;
  const float* bqkv;
  const float* bo;
  size_t heads, head_size, capacity;
  CacheType cache;
  const void* past_key;
  const void* past_value;
  const int64_t* start;
  const int64_t* past;
  bool kv_active_only;
  const float* residual;   // x where the operator has a norm, else null; set by the kernel
  Rounding rounding;       // none where every token is masked
  Int4Digits int4_digits;  // of all tokens
  float* y;
  void* present_key;
  void* present_value;
  float* context;
};

ReadCount SparseAttention(const AttentionArgs& args, const Parallel& parallel);

}  // namespace shadowc
