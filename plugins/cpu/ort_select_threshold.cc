// SPDX-License-Identifier: Apache-2.0
// SelectThreshold as an ONNX Runtime operator: checks shapes, then calls the kernel (select_threshold.h).
#include "ort_op.h"
#include "select_threshold.h"

namespace shadowc {
namespace {

constexpr const char* kName = "SelectThreshold";
enum In : size_t { kScores, kDensity, kInputs };
enum Out : size_t { kThreshold, kActive, kOutputs };

class SelectThresholdKernel : public Kernel {
 public:
  explicit SelectThresholdKernel(const Node& node)
      : node_(node.Name()),
        inputs_(node, kInputs),
        scope_(node.Text("scope", "local")),
        exempt_(node.Ints("exempt", {-1})),
        min_active_(node.Int("min_active", 0)) {
    Problems problems(kName, node_);
    if (scope_ != "local" && scope_ != "global")
      problems.Add("attribute scope", "'local' or 'global'", "'" + scope_ + "'");
    if (min_active_ < 0) problems.Add("attribute min_active", "at least 0", std::to_string(min_active_));
    problems.ThrowIfAny();
  }

 private:
  void Compute(Call& call) const override {
    Problems problems(kName, node_);
    const Input<float> scores = inputs_.Read<float>(call, kScores),
                       density = inputs_.Read<float>(call, kDensity);
    problems.ExpectRank("scores", scores.shape, 4, "[B, S', L, N]");
    problems.ThrowIfAny();
    const int64_t batch = scores.shape[0], layers = scores.shape[2];
    if (!(density.shape == Shape{batch} || density.shape == Shape{1}))
      problems.Add("density", "[1] or [B] = [" + std::to_string(batch) + "]", ToText(density.shape));
    SelectArgs a{};
    a.exempt.assign(static_cast<size_t>(layers), 0);
    for (const int64_t layer : exempt_) {  // an index that is no layer (-1) exempts nothing
      if (layer >= 0 && layer < layers) a.exempt[static_cast<size_t>(layer)] = 1;
    }
    problems.ThrowIfAny();
    a.scores = scores.data;
    a.density = density.data;
    a.batch = static_cast<size_t>(batch);
    a.tail = static_cast<size_t>(scores.shape[1]);
    a.layers = static_cast<size_t>(layers);
    a.units = static_cast<size_t>(scores.shape[3]);
    a.density_count = static_cast<size_t>(density.shape[0]);
    a.global = scope_ == "global";
    a.min_active = static_cast<size_t>(min_active_);
    const Shape per_layer = {scores.shape[0], scores.shape[1], scores.shape[2]};
    a.threshold = Output<float>(call, kThreshold, per_layer);
    a.active = Output<int32_t>(call, kActive, per_layer);
    shadowc::SelectThreshold(a, call.Pool());
  }

  std::string node_;
  Inputs inputs_;
  std::string scope_;
  std::vector<int64_t> exempt_;
  int64_t min_active_;
};

struct SelectThresholdOpType : OpBase<SelectThresholdOpType, SelectThresholdKernel> {
  static constexpr size_t kRequiredInputs = kInputs, kRequiredOutputs = 2;
  const char* GetName() const { return kName; }
  size_t GetInputTypeCount() const { return kInputs; }
  size_t GetOutputTypeCount() const { return kOutputs; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return index == kActive ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
};

}  // namespace

const OrtCustomOp* SelectThresholdOp() {
  static const SelectThresholdOpType op;
  return &op;
}

std::unique_ptr<Kernel> SelectThresholdKernelOf(const Node& node) {
  return std::make_unique<SelectThresholdKernel>(node);
}

}  // namespace shadowc
