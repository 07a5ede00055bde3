// SPDX-License-Identifier: Apache-2.0
// PredictUnits, of heads and of neurons. It has no dense twin: its neighbour is one dense FFN, which a
// layer's predictor has to be small beside; the floor is the network's weights.
#include "predict_units.h"

#include <string>

#include "measure.h"
#include "sparse_ffn.h"

namespace bench {
namespace {

constexpr size_t kHidden = 128;

struct Network {
  explicit Network(size_t units)
      : units(units), scales2(units, 1e-3f), b2(units), scores(units), last(units) {}

  size_t units;
  std::vector<float> x = Uniform(kWidth, -1, 1), scales1 = std::vector<float>(kHidden, 1e-3f),
                     b1 = std::vector<float>(kHidden), scales2, b2, scores, last;
  float density = 0.2f, threshold = 0.0f;
  int32_t active = 0;
};

Operator Predict(shadowc::WeightType type, Network* network) {
  const size_t size = type == shadowc::WeightType::kInt8 ? 1 : sizeof(float);
  const size_t first = kHidden * kWidth, second = network->units * kHidden;
  return [=](size_t layer) {
    shadowc::PredictArgs a{};
    a.x = network->x.data(), a.batch = a.tokens = a.tail = 1, a.width = kWidth;
    a.type = type;
    a.w1 = LayerOf(type, first + second, layer);
    a.w2 = static_cast<const char*>(a.w1) + first * size;
    a.scales1 = network->scales1.data(), a.b1 = network->b1.data();
    a.scales2 = network->scales2.data(), a.b2 = network->b2.data();
    a.hidden = kHidden, a.units = network->units;
    a.density = &network->density, a.density_batch = a.densities = 1;
    a.scores = network->scores.data(), a.last = network->last.data();
    a.threshold = &network->threshold, a.active = &network->active;
    shadowc::PredictUnits(a, ThePool());
    return static_cast<double>((first + second) * size);
  };
}

Operator DenseFfn(shadowc::WeightType type) {
  return [=, scales = std::vector<float>(kNeurons * 2, 1e-3f), bias = std::vector<float>(kNeurons),
          x = Uniform(kWidth, -1, 1), y = std::vector<float>(kWidth)](size_t layer) mutable {
    shadowc::FfnArgs a{};
    a.x = x.data(), a.batch = a.tokens = 1, a.width = kWidth;
    a.selection.units = kNeurons;
    a.type = type;
    a.w = LayerOf(type, kNeurons * 2 * kWidth, layer);
    a.scales = scales.data(), a.b1 = a.b2 = bias.data();
    a.neurons = kNeurons, a.block = 1, a.y = y.data();
    return static_cast<double>(shadowc::SparseFfn(a, ThePool()).bytes);
  };
}

void Run(benchmark::State& state, shadowc::WeightType type, size_t units) {
  Network network(units);
  Compare(state, Predict(type, &network), DenseFfn(type));
}

}  // namespace

void RegisterPredict() {
  for (const auto& [name, type] : kTypes) {
    const bool is_network_type = type == shadowc::WeightType::kFloat32 || type == shadowc::WeightType::kInt8;
    if (!is_network_type) continue;
    for (const size_t units : {kHeads, kNeurons}) {
      const std::string title = std::string("PredictUnits/") + name + "/units:" + std::to_string(units);
      benchmark::RegisterBenchmark(title.c_str(), Run, type, units)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace bench
