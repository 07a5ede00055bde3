// SPDX-License-Identifier: Apache-2.0
// SparseFFN as an ONNX Runtime operator: checks shapes, then calls the kernel (sparse_ffn.h).
#include "ort_op.h"
#include "sparse_ffn.h"

namespace shadowc {
namespace {

constexpr const char* kName = "SparseFFN";
enum In : size_t { kX, kScores, kThreshold, kW, kScales, kB1, kB2, kNorm, kNormBias, kInputs };
enum Out : size_t { kY, kRead, kOutputs };

class SparseFfnKernel : public Kernel {
 public:
  explicit SparseFfnKernel(const Node& node)
      : node_(node.Name()),
        inputs_(node, kInputs),
        layer_(node.Int("layer", 0)),
        block_(node.Int("block", 1)),
        skip_zeros_(node.Int("skip_zeros", 0) != 0),
        rounding_(RoundingOf(node)),
        int4_digits_(Int4DigitsOf(node)),
        epsilon_(node.Float(kEpsilon, kDefaultEpsilon)) {
    Problems problems(kName, node_);
    if (block_ < 1) problems.Add("attribute block", "at least 1", std::to_string(block_));
    CheckFewDigits(node, &problems);
    CheckWeightType(node, kW, &problems);
    problems.ThrowIfAny();
  }

 private:
  void Compute(Call& call) const override {
    Problems problems(kName, node_);
    const Input<float> x = inputs_.Read<float>(call, kX), scales = inputs_.Read<float>(call, kScales);
    const Input<float> b1 = inputs_.Read<float>(call, kB1), b2 = inputs_.Read<float>(call, kB2);
    const Weights w = inputs_.ReadWeights(call, kW, &problems);
    problems.ExpectRank("x", x.shape, 3, "[B, S, E]");
    problems.ExpectRank("w", w.shape, 3, "[F, 2, E]");
    problems.ThrowIfAny();
    const int64_t width = x.shape[2], neurons = w.shape[0];
    if (width < 1) problems.Add("E (axis 2 of x)", "at least 1", "0");
    ExpectWeights(w, scales.shape, {neurons, 2}, width, "F, 2", &problems);
    problems.ExpectShape("b1", b1.shape, {neurons}, "[F]");
    problems.ExpectShape("b2", b2.shape, {width}, "[E]");
    FfnArgs a{};
    a.norm = inputs_.ReadNorm(call, kNorm, width, epsilon_, &problems);
    a.selection =
        inputs_.ReadSelection(call, kScores, kThreshold, layer_, x.shape[0], x.shape[1],
                              neurons / block_ + (neurons % block_ != 0), "ceil(F / block)", &problems);
    problems.ThrowIfAny();
    a.x = x.data;
    a.batch = static_cast<size_t>(x.shape[0]);
    a.tokens = static_cast<size_t>(x.shape[1]);
    a.width = static_cast<size_t>(width);
    a.type = w.type;
    a.w = w.data;
    a.scales = scales.data;
    a.b1 = b1.data;
    a.b2 = b2.data;
    a.neurons = static_cast<size_t>(neurons);
    a.block = static_cast<size_t>(block_);
    a.skip_zeros = skip_zeros_;
    a.rounding = a.selection.tail < a.tokens ? rounding_ : Rounding::kNone;
    a.int4_digits = int4_digits_;
    a.y = Output<float>(call, kY, x.shape);
    WriteRead(call, kRead, SparseFfn(a, call.Pool()));
  }

  std::string node_;
  Inputs inputs_;
  int64_t layer_, block_;
  bool skip_zeros_;
  Rounding rounding_;
  Int4Digits int4_digits_;
  float epsilon_;
};

struct SparseFfnOpType : OpBase<SparseFfnOpType, SparseFfnKernel> {
  static constexpr size_t kRequiredInputs = kNorm, kRequiredOutputs = 1;
  const char* GetName() const { return kName; }
  size_t GetInputTypeCount() const { return kInputs; }
  size_t GetOutputTypeCount() const { return kOutputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == kW ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return index == kRead ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
};

}  // namespace

const OrtCustomOp* SparseFfnOp() {
  static const SparseFfnOpType op;
  return &op;
}

std::unique_ptr<Kernel> SparseFfnKernelOf(const Node& node) {
  return std::make_unique<SparseFfnKernel>(node);
}

}  // namespace shadowc
