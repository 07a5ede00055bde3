// SPDX-License-Identifier: Apache-2.0
// SparseAttention, one token or a prompt. Its dense neighbour is the same call with all heads; the floor is
// the weights that it read and the cache of its active heads.
#include "sparse_attention.h"

#include <algorithm>
#include <string>

#include "measure.h"

namespace bench {
namespace {

struct Layers {
  explicit Layers(size_t room) : capacity(room) {}

  size_t capacity;
  std::vector<float> scales = ScalesOf(kHeads * 4 * kHeadSize),
                     bqkv = std::vector<float>(kHeads * 3 * kHeadSize), bo = std::vector<float>(kWidth),
                     scores = Uniform(kHeads, 0, 1), key = Uniform(capacity * kWidth, -1, 1),
                     value = Uniform(capacity * kWidth, -1, 1);
};

struct Case {
  size_t tokens;
  int64_t past;
  float kept;
  bool active_only;
  bool few_digits = false;
};

Operator Attention(shadowc::WeightType type, Layers* layers, const Case& what, std::vector<float>* x,
                   std::vector<float>* y) {
  return [=](size_t layer) {
    // Tokens before the last one have no mask: a prompt is dense whatever is kept.
    const float threshold = 1.0f - what.kept;
    const int64_t start = 0;
    shadowc::AttentionArgs a{};
    a.x = x->data(), a.batch = 1, a.tokens = what.tokens, a.width = kWidth;
    a.selection.scores = layers->scores.data(), a.selection.threshold = &threshold;
    a.selection.tail = 1, a.selection.units = kHeads;
    a.type = type;
    a.w = LayerOf(type, kHeads * 4 * kHeadSize * kWidth, layer);
    a.scales = layers->scales.data(), a.bqkv = layers->bqkv.data(), a.bo = layers->bo.data();
    a.heads = kHeads, a.head_size = kHeadSize, a.capacity = layers->capacity;
    a.past_key = a.present_key = layers->key.data(), a.past_value = a.present_value = layers->value.data();
    a.start = &start, a.past = &what.past, a.kv_active_only = what.active_only;
    a.rounding = what.few_digits ? shadowc::Rounding::kFreely : shadowc::Rounding::kNone;
    a.int4_digits = what.few_digits ? shadowc::Int4Digits::kOne : shadowc::Int4Digits::kThree;
    a.y = y->data();
    a.context = y->data() + what.tokens * kWidth;
    const double weights = static_cast<double>(shadowc::SparseAttention(a, ThePool()).bytes);
    const auto active = std::count_if(layers->scores.begin(), layers->scores.end(),
                                      [&](float score) { return !(score < threshold); });
    return weights + 2.0 * static_cast<double>(active * what.past) * kHeadSize * sizeof(float);
  };
}

void Run(benchmark::State& state, shadowc::WeightType type, const Case& what) {
  Layers layers(static_cast<size_t>(what.past) + what.tokens);
  std::vector<float> x = Uniform(what.tokens * kWidth, -1, 1), y(2 * x.size());
  const Case dense = {what.tokens, what.past, 1.0f, what.active_only, what.few_digits};
  Compare(state, Attention(type, &layers, what, &x, &y), Attention(type, &layers, dense, &x, &y));
}

}  // namespace

void RegisterAttention() {
  for (const auto& [name, type] : kTypes) {
    for (const Case& what : {Case{1, 128, 1.0f, false}, Case{1, 128, 0.5f, false}, Case{1, 128, 0.2f, false},
                             Case{1, 128, 0.5f, true}, Case{1, 1900, 1.0f, false}, Case{1, 1900, 0.5f, false},
                             Case{1, 128, 1.0f, false, true}, Case{1, 128, 0.5f, false, true},
                             Case{512, 0, 1.0f, false}, Case{512, 0, 1.0f, false, true}}) {
      if (what.few_digits && what.tokens == 1 && type != shadowc::WeightType::kInt4) continue;  // the same
      const std::string title =
          std::string("SparseAttention/") + name + "/tokens:" + std::to_string(what.tokens) +
          "/past:" + std::to_string(what.past) +
          "/kept:" + std::to_string(static_cast<int>(what.kept * 100)) +
          (what.active_only ? "/kv_active" : "") + (what.few_digits ? "/few_digits" : "");
      benchmark::RegisterBenchmark(title.c_str(), Run, type, what)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace bench
