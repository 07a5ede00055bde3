// SPDX-License-Identifier: Apache-2.0
// How an operator is timed: in turn with its dense neighbour, beside the time that its bytes take at the
// machine's read bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include <benchmark/benchmark.h>

#include "parallel.h"
#include "types.h"

namespace bench {

// The shape of OPT-1.3B.
inline constexpr size_t kWidth = 2048, kVocabulary = 50272, kNeurons = 8192, kHeads = 32, kHeadSize = 64,
                        kPredictedLayers = 23;

inline constexpr struct {
  const char* name;
  shadowc::WeightType type;
} kTypes[] = {{"fp32", shadowc::WeightType::kFloat32},
              {"bf16", shadowc::WeightType::kBFloat16},
              {"int8", shadowc::WeightType::kInt8},
              {"int4", shadowc::WeightType::kInt4}};

// Enough scales for `rows` record rows of kWidth weights, whatever their type.
inline std::vector<float> ScalesOf(size_t rows) {
  return std::vector<float>(rows * shadowc::RowScales<shadowc::Int4Pair>(kWidth), 1e-3f);
}

// All calls run on one pool of --threads=N threads (all of the machine's, unless told otherwise).
extern int threads;
const shadowc::Parallel& ThePool();

// Weights of one layer of so many elements, page aligned as in a mapped file. Consecutive layers follow each
// other in more memory than any cache holds; all operators share it.
const void* LayerOf(shadowc::WeightType type, size_t elements, size_t layer);

std::vector<float> Uniform(size_t count, float low, float high);

// Runs one layer, returns the bytes that it cannot do without.
using Operator = std::function<double(size_t layer)>;

// Times `op`, and in turn with it `dense`, both over all layers. Counters of one call of op:
//   bytes_per_second
//   floor_ms  what its bytes take at the bandwidth of the moment (StreamRead, several times a second)
//   of_floor  its time, as a multiple of that
//   of_dense  its time, as a share of that of `dense`
void Compare(benchmark::State& state, const Operator& op, const Operator& dense);

// What each file registers; called from main once `threads` is known.
void RegisterFfn();
void RegisterMatMul();
void RegisterAttention();
void RegisterSelect();
void RegisterPredict();
void RegisterRecords();

}  // namespace bench
