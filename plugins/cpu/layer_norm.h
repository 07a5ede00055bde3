// SPDX-License-Identifier: Apache-2.0
// LayerNormalization of rows by themselves, as ONNX has it; most norms are part of the operator behind them.
//
// Shapes: x and y [rows, width], scale and bias [width].
#pragma once

#include <cstddef>

#include "parallel.h"
#include "types.h"

namespace shadowc {

void LayerNorm(const float* x, const Norm& norm, size_t rows, size_t width, float* y,
               const Parallel& parallel);

}  // namespace shadowc
