// SPDX-License-Identifier: Apache-2.0
// SparseFFN: y = fc2(relu(fc1(x))) over the active blocks of neurons of each row.
//
// Shapes: x [B, S, E], w [F, 2, E] (fc1 row, then fc2 column: one neuron is one contiguous record),
// scales [F, 2] (one factor per half record; int4, packed to [F, 2, E / 2]: [F, 2, E / 64]), b1 [F], b2 [E],
// y [B, S, E]; unit u of the selection is the neurons u * block ... min(F, (u + 1) * block) - 1. ReLU lets
// NaN through, as ONNX Runtime's does. With nothing active a row is exactly b2. skip_zeros: the fc2 half of a
// neuron whose ReLU output is 0 (for each row of the tile that computes it) is not read. Adding 0 * w changes
// nothing, so the result is the same, bit for bit.
//
// read.records: neurons whose fc1 half was read, per tile of rows (types.h). read.bytes: per record E weights
// and their scales, and as much again if its fc2 half was read.
#pragma once

#include "parallel.h"
#include "types.h"

namespace shadowc {

struct FfnArgs {
  const float* x;
  Norm norm;
  size_t batch, tokens, width;
  Selection selection;
  WeightType type;
  const void* w;
  const float* scales;
  const float* b1;
  const float* b2;
  size_t neurons, block;
  bool skip_zeros;
  const float* residual;   // x where the operator has a norm, else null; set by the kernel
  Rounding rounding;       // none where every token is masked
  Int4Digits int4_digits;  // of all tokens
  float* y;
};

ReadCount SparseFfn(const FfnArgs& args, const Parallel& parallel);

}  // namespace shadowc
