// SPDX-License-Identifier: Apache-2.0
// NextToken as a step of a chain: ids [B, 1] of the largest logits [B, S, V] of each row's last token, but
// for `banned` [1], an id that is not to be chosen, or -1.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "ort_op.h"

namespace shadowc {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// The largest of them, or NaN if there is one.
float LargestOf(const float* logits, size_t n) {
  constexpr size_t kLanes = 32;  // side by side, so that compilers make vectors of them
  std::array<float, kLanes> largest;
  std::array<int32_t, kLanes> numbers;
  largest.fill(kLowest);
  numbers.fill(1);
  const auto take = [&](size_t lane, float logit) {
    largest[lane] = logit > largest[lane] ? logit : largest[lane];
    numbers[lane] &= logit == logit;
  };
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) take(lane, logits[i + lane]);
  }
  for (; i < n; ++i) take(0, logits[i]);
  if (*std::min_element(numbers.begin(), numbers.end()) == 0) return std::numeric_limits<float>::quiet_NaN();
  return *std::max_element(largest.begin(), largest.end());
}

// The first of the largest, if it is larger than `largest`: goes on from what was found before `begin`.
void LookThrough(const float* logits, size_t begin, size_t end, size_t* id, float* largest) {
  constexpr size_t kPiece = 2048;  // looked through again if it holds a larger one
  for (size_t from = begin; from < end && !std::isnan(*largest); from += kPiece) {
    const float *first = logits + from, *last = logits + std::min(end, from + kPiece);
    const float value = LargestOf(first, static_cast<size_t>(last - first));
    if (value <= *largest) continue;
    const auto is_it = [=](float one) { return std::isnan(value) ? std::isnan(one) : one == value; };
    *id = static_cast<size_t>(std::find_if(first, last, is_it) - logits);
    *largest = value;
  }
}

// As NumPy's argmax has it: the first one, and NaN is larger than all. `banned` counts as minus infinity.
int64_t LargestId(const float* logits, size_t vocabulary, int64_t banned) {
  const size_t hole = banned < 0 ? vocabulary : std::min(vocabulary, static_cast<size_t>(banned));
  size_t id = 0;
  float largest = kLowest;
  LookThrough(logits, 0, hole, &id, &largest);
  LookThrough(logits, std::min(vocabulary, hole + 1), vocabulary, &id, &largest);
  return static_cast<int64_t>(id);
}

class NextTokenKernel : public Kernel {
 public:
  explicit NextTokenKernel(const Node& node) : node_(node.Name()), inputs_(node, 2) {}

 private:
  void Compute(Call& call) const override {
    Problems problems("NextToken", node_);
    const Input<float> logits = inputs_.Read<float>(call, 0);
    const Input<int64_t> banned = inputs_.Read<int64_t>(call, 1);
    problems.ExpectRank("logits", logits.shape, 3, "[B, S, V]");
    problems.ExpectShape("banned", banned.shape, {1}, "[1]");
    problems.ThrowIfAny();
    const Shape& shape = logits.shape;
    if (shape[1] < 1 || shape[2] < 1) problems.Add("S and V of logits", "at least 1", ToText(shape));
    problems.ThrowIfAny();
    int64_t* ids = Output<int64_t>(call, 0, {shape[0], 1});
    for (int64_t b = 0; b < shape[0]; ++b) {
      const float* last = logits.data + ((b + 1) * shape[1] - 1) * shape[2];
      ids[b] = LargestId(last, static_cast<size_t>(shape[2]), banned.data[0]);
    }
  }

  std::string node_;
  Inputs inputs_;
};

}  // namespace

std::unique_ptr<Kernel> NextTokenKernelOf(const Node& node) {
  return std::make_unique<NextTokenKernel>(node);
}

}  // namespace shadowc
