// SPDX-License-Identifier: Apache-2.0
// What every kernel file includes first: the CUDA language under nvcc, its stand-in from tests/emulation
// elsewhere. Kernels keep to what both have: plain SIMT code, shuffles, ballots, __syncthreads and integer
// atomics.
#pragma once

#include "kernels.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// SHADOWC_LAUNCH((kernel<A, B>), grid, threads, stream, arguments...): arguments are passed by value.
#define SHADOWC_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)

// Shared memory of a block.
#define SHADOWC_SHARED(type, name, count) __shared__ type name[count]

#else

#include "cuda_emulation.h"

#endif

namespace shadowc {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace shadowc
