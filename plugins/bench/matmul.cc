// SPDX-License-Identifier: Apache-2.0
// MatMulRows as the LM head. Nothing in it is sparse: it is its own dense neighbour; the floor is its matrix.
#include "matmul_rows.h"

#include <string>

#include "measure.h"

namespace bench {
namespace {

void Run(benchmark::State& state, size_t rows) {
  std::vector<float> x = Uniform(rows * kWidth, -1, 1), y(rows * kVocabulary);
  const std::vector<float> scales(kVocabulary, 1e-3f);
  const Operator head = [&](size_t layer) {
    shadowc::MatMulRowsArgs a{};
    a.x = x.data(), a.rows = rows, a.width = kWidth;
    a.w = static_cast<const int8_t*>(LayerOf(shadowc::WeightType::kInt8, kVocabulary * kWidth, layer));
    a.scales = scales.data(), a.outputs = kVocabulary, a.y = y.data();
    shadowc::MatMulRows(a, ThePool());
    return static_cast<double>(kVocabulary * (kWidth + sizeof(float)));
  };
  Compare(state, head, head);
}

}  // namespace

void RegisterMatMul() {
  for (const size_t rows : {1, 8, 512}) {
    const std::string title = "MatMulRows/int8/rows:" + std::to_string(rows);
    benchmark::RegisterBenchmark(title.c_str(), Run, rows)->UseManualTime()->Unit(benchmark::kMillisecond);
  }
}

}  // namespace bench
