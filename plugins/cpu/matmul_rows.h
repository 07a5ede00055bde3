// SPDX-License-Identifier: Apache-2.0
// MatMulRows: rows of x times all rows of an int8 matrix (the LM head, and a predictor of all layers).
//
// Shapes: x [rows, width]; w [outputs, width] with a factor per row in scales [outputs]; y [rows, outputs].
// Activations are not rounded to 8 bits. Nothing depends on the number of threads, nor a row of y on what
// other rows hold; on how many there are only in its last bits, as many meet weights in panels (panels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace shadowc {

struct MatMulRowsArgs {
  const float* x;
  size_t rows, width;
  const int8_t* w;
  const float* scales;
  size_t outputs;
  float* y;
};

void MatMulRows(const MatMulRowsArgs& args, const Parallel& parallel);

}  // namespace shadowc
