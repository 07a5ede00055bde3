// SPDX-License-Identifier: Apache-2.0
// SparseFFN. Its dense neighbour is the same call with all neurons; the floor is the weights that it read.
#include "sparse_ffn.h"

#include <algorithm>
#include <string>

#include "measure.h"

namespace bench {
namespace {

struct Layers {
  std::vector<float> scales = ScalesOf(kNeurons * 2), b1 = std::vector<float>(kNeurons),
                     b2 = std::vector<float>(kWidth), scores = Uniform(kNeurons, 0, 1);
};

struct Case {
  size_t rows;
  float kept;
  bool skip_zeros;
  bool few_digits = false;
};

Operator Ffn(shadowc::WeightType type, const Layers& layers, const Case& what, std::vector<float>* x,
             std::vector<float>* y) {
  return [=, &layers](size_t layer) {
    const float threshold = 1.0f - what.kept;
    shadowc::FfnArgs a{};
    a.x = x->data(), a.batch = what.rows, a.tokens = 1, a.width = kWidth;
    a.selection.scores = layers.scores.data(), a.selection.threshold = &threshold;
    a.selection.tail = 1, a.selection.units = kNeurons;
    a.type = type;
    a.w = LayerOf(type, kNeurons * 2 * kWidth, layer);
    a.scales = layers.scales.data(), a.b1 = layers.b1.data(), a.b2 = layers.b2.data();
    a.neurons = kNeurons, a.block = 1, a.skip_zeros = what.skip_zeros, a.y = y->data();
    a.rounding = what.few_digits ? shadowc::Rounding::kFreely : shadowc::Rounding::kNone;
    a.int4_digits = what.few_digits ? shadowc::Int4Digits::kOne : shadowc::Int4Digits::kThree;
    return static_cast<double>(shadowc::SparseFfn(a, ThePool()).bytes);
  };
}

void Run(benchmark::State& state, shadowc::WeightType type, const Case& what) {
  Layers layers;
  // With x in -1 ... 1 about half of the neurons fire; this bias leaves some 5 %, as in a real OPT.
  if (what.skip_zeros) std::fill(layers.b1.begin(), layers.b1.end(), -2.8f);
  std::vector<float> x = Uniform(what.rows * kWidth, -1, 1), y(x.size());
  Compare(state, Ffn(type, layers, what, &x, &y),
          Ffn(type, layers, {what.rows, 1.0f, false, what.few_digits}, &x, &y));
}

}  // namespace

void RegisterFfn() {
  for (const auto& [name, type] : kTypes) {
    for (const Case& what :
         {Case{1, 1.0f, false}, Case{1, 0.5f, false}, Case{1, 0.2f, false}, Case{1, 0.1f, false},
          Case{1, 1.0f, true}, Case{8, 1.0f, false}, Case{8, 0.5f, false}, Case{512, 1.0f, false},
          Case{1, 1.0f, false, true}, Case{1, 0.5f, false, true}, Case{33, 1.0f, false, true},
          Case{512, 1.0f, false, true}}) {
      if (what.few_digits && what.rows == 1 && type != shadowc::WeightType::kInt4) continue;  // the same
      const std::string title = std::string("SparseFFN/") + name + "/rows:" + std::to_string(what.rows) +
                                "/kept:" + std::to_string(static_cast<int>(what.kept * 100)) +
                                (what.skip_zeros ? "/skip_zeros" : "") +
                                (what.few_digits ? "/few_digits" : "");
      benchmark::RegisterBenchmark(title.c_str(), Run, type, what)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace bench
