// SPDX-License-Identifier: Apache-2.0
// SparseFFN over many rows in panels (panels.h). Same meaning as SparseFfn.
#pragma once

#include "arena.h"
#include "panels.h"
#include "sparse_ffn.h"

namespace shadowc {

// Computes the rows y whose x and hidden values have digits. Returns false if there are others: their y is
// then unwritten and left[row] (room for a whole number of panels) is 1.
bool FfnPanels(const PanelKernels& kernels, const FfnArgs& args, CallArena* arena, const Parallel& parallel,
               uint8_t* left, ReadCount* read);

}  // namespace shadowc
