// SPDX-License-Identifier: Apache-2.0
// SelectThreshold over all predicted layers of one token. It has no dense twin: its neighbour is the call
// that keeps all, which need not rank anything; the floor is one read of the scores.
#include "select_threshold.h"

#include "measure.h"

namespace bench {
namespace {

Operator Select(const std::vector<float>& scores, float kept, bool global, std::vector<float>* threshold,
                std::vector<int32_t>* active) {
  return [=, &scores](size_t) {
    shadowc::SelectArgs a{};
    a.scores = scores.data(), a.density = &kept, a.batch = a.tail = a.density_count = 1;
    a.layers = kPredictedLayers, a.units = kNeurons, a.exempt.assign(kPredictedLayers, 0);
    a.global = global, a.threshold = threshold->data(), a.active = active->data();
    shadowc::SelectThreshold(a, ThePool());
    return static_cast<double>(scores.size() * sizeof(float));
  };
}

void Run(benchmark::State& state, bool global) {
  const std::vector<float> scores = Uniform(kPredictedLayers * kNeurons, 0, 1);
  std::vector<float> threshold(kPredictedLayers);
  std::vector<int32_t> active(kPredictedLayers);
  Compare(state, Select(scores, 0.2f, global, &threshold, &active),
          Select(scores, 1.0f, global, &threshold, &active));
}

}  // namespace

void RegisterSelect() {
  for (const bool global : {false, true}) {
    benchmark::RegisterBenchmark(global ? "SelectThreshold/global/kept:20" : "SelectThreshold/local/kept:20",
                                 Run, global)
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  }
}

}  // namespace bench
