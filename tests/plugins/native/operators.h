// SPDX-License-Identifier: Apache-2.0
// The operators of plugins/cpu over tensors by name: what plugins/cpu/ort_*.cc do for ONNX Runtime, without
// its checks.
#pragma once

#include "parallel.h"
#include "wire.h"

// Outputs by name. With the attribute in_place the cache's present is the memory of its past.
Tensors Run(const Call& call, const shadowc::Parallel& parallel);
