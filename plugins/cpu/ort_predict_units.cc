// SPDX-License-Identifier: Apache-2.0
// PredictUnits as an ONNX Runtime operator: checks shapes, then calls the kernel (predict_units.h).
#include "ort_op.h"
#include "predict_units.h"

namespace shadowc {
namespace {

constexpr const char* kName = "PredictUnits";
enum In : size_t { kX, kTail, kDensity, kW1, kScales1, kB1, kW2, kScales2, kB2, kNorm, kNormBias, kInputs };
enum Out : size_t { kScores, kThreshold, kActive, kLast, kOutputs };

const char* NameOf(WeightType type) {
  switch (type) {
    case WeightType::kFloat32:
      return "float32";
    case WeightType::kBFloat16:
      return "bfloat16";
    case WeightType::kInt8:
      return "int8";
    case WeightType::kInt4:
      return "uint8";
  }
  return "unknown";
}

class PredictUnitsKernel : public Kernel {
 public:
  explicit PredictUnitsKernel(const Node& node)
      : node_(node.Name()),
        inputs_(node, kInputs),
        select_(node.Text("select", "density")),
        column_(node.Int("column", 0)),
        min_active_(node.Int("min_active", 0)),
        relu_(node.Int("relu", 0) != 0),
        exempt_(node.Int("exempt", 0) != 0),
        epsilon_(node.Float(kEpsilon, kDefaultEpsilon)) {
    Problems problems(kName, node_);
    if (column_ < 0) problems.Add("attribute column", "at least 0", std::to_string(column_));
    if (min_active_ < 0) problems.Add("attribute min_active", "at least 0", std::to_string(min_active_));
    if (select_ != "density" && select_ != "threshold")
      problems.Add("attribute select", "'density' or 'threshold'", "'" + select_ + "'");
    problems.ThrowIfAny();
  }

 private:
  void Compute(Call& call) const override {
    Problems problems(kName, node_);
    PredictArgs a{};
    const Shape x = ReadTokens(call, &a, &problems);
    ReadNetwork(call, x[2], &a, &problems);
    ReadDensity(call, x[0], &a, &problems);
    problems.ThrowIfAny();
    const int64_t tail = static_cast<int64_t>(a.tail), units = static_cast<int64_t>(a.units);
    a.scores = Output<float>(call, kScores, {x[0], tail, 1, units});
    a.threshold = Output<float>(call, kThreshold, {x[0], tail, 1});
    a.active = Output<int32_t>(call, kActive, {x[0], tail, 1});
    a.last = Output<float>(call, kLast, {x[0], 1, 1, units});
    shadowc::PredictUnits(a, call.Pool());
  }

  Shape ReadTokens(Call& call, PredictArgs* a, Problems* problems) const {
    const Input<float> x = inputs_.Read<float>(call, kX);
    const Input<int64_t> tail = inputs_.Read<int64_t>(call, kTail);
    problems->ExpectRank("x", x.shape, 3, "[B, S, E]");
    problems->ExpectShape("tail", tail.shape, {1}, "[1]");
    problems->ThrowIfAny();
    if (x.shape[1] < 1) problems->Add("S (axis 1 of x)", "at least 1", "0");
    if (x.shape[2] < 1) problems->Add("E (axis 2 of x)", "at least 1", "0");
    if (tail.data[0] < 0 || tail.data[0] > x.shape[1])
      problems->Add("tail", "0 to S = " + std::to_string(x.shape[1]), std::to_string(tail.data[0]));
    problems->ThrowIfAny();
    a->x = x.data;
    a->batch = static_cast<size_t>(x.shape[0]);
    a->tokens = static_cast<size_t>(x.shape[1]);
    a->width = static_cast<size_t>(x.shape[2]);
    a->tail = static_cast<size_t>(tail.data[0]);
    a->norm = inputs_.ReadNorm(call, kNorm, x.shape[2], epsilon_, problems);
    return x.shape;
  }

  void ReadNetwork(Call& call, int64_t width, PredictArgs* a, Problems* problems) const {
    const Weights w1 = inputs_.ReadWeights(call, kW1, problems);
    const Weights w2 = inputs_.ReadWeights(call, kW2, problems);
    const auto read = [&](size_t index) { return inputs_.Read<float>(call, index); };
    const Input<float> scales1 = read(kScales1), b1 = read(kB1), scales2 = read(kScales2), b2 = read(kB2);
    problems->ExpectRank("w1", w1.shape, 2, "[P, E]");
    problems->ExpectRank("b2", b2.shape, 1, "[N]");
    problems->ThrowIfAny();
    const int64_t hidden = w1.shape[0], units = b2.shape[0];
    const bool int8 = w1.type == WeightType::kInt8;
    if (w1.type != w2.type || !(w1.type == WeightType::kFloat32 || int8))
      problems->Add("w1 and w2", "float32 or int8, both alike",
                    std::string(NameOf(w1.type)) + " and " + NameOf(w2.type));
    if (hidden < 1) problems->Add("P (axis 0 of w1)", "at least 1", "0");
    if (units < 1) problems->Add("N (axis 0 of b2)", "at least 1", "0");
    problems->ExpectShape("w1", w1.shape, {hidden, width}, "[P, E]");
    problems->ExpectShape("scales1", scales1.shape, {hidden}, "[P]");
    problems->ExpectShape("b1", b1.shape, {hidden}, "[P]");
    if (int8) {
      problems->ExpectShape("w2", w2.shape, {(units + 15) / 16, (hidden + 3) / 4, 16, 4},
                            "[ceil(N / 16), ceil(P / 4), 16, 4]");
    } else {
      problems->ExpectShape("w2", w2.shape, {units, hidden}, "[N, P]");
    }
    problems->ExpectShape("scales2", scales2.shape, {units}, "[N]");
    a->type = w1.type;
    a->w1 = w1.data;
    a->w2 = w2.data;
    a->scales1 = scales1.data;
    a->scales2 = scales2.data;
    a->b1 = b1.data;
    a->b2 = b2.data;
    a->hidden = static_cast<size_t>(hidden);
    a->units = static_cast<size_t>(units);
    a->relu = relu_;
  }

  void ReadDensity(Call& call, int64_t batch, PredictArgs* a, Problems* problems) const {
    const Input<float> density = inputs_.Read<float>(call, kDensity);
    problems->ExpectRank("density", density.shape, 2, "[1 or B, K]");
    problems->ThrowIfAny();
    if (density.shape[0] != 1 && density.shape[0] != batch)
      problems->Add("density", "[1 or B = " + std::to_string(batch) + ", K]", ToText(density.shape));
    if (column_ >= density.shape[1])
      problems->Add("attribute column", "below K = " + std::to_string(density.shape[1]),
                    std::to_string(column_));
    a->density = density.data;
    a->is_threshold = select_ == "threshold";
    a->density_batch = static_cast<size_t>(density.shape[0]);
    a->densities = static_cast<size_t>(density.shape[1]);
    a->column = static_cast<size_t>(column_);
    a->exempt = exempt_;
    a->min_active = static_cast<size_t>(min_active_);
  }

  std::string node_;
  Inputs inputs_;
  std::string select_;
  int64_t column_, min_active_;
  bool relu_, exempt_;
  float epsilon_;
};

struct PredictUnitsOpType : OpBase<PredictUnitsOpType, PredictUnitsKernel> {
  static constexpr size_t kRequiredInputs = kNorm, kRequiredOutputs = 3;
  const char* GetName() const { return kName; }
  size_t GetInputTypeCount() const { return kInputs; }
  size_t GetOutputTypeCount() const { return kOutputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    if (index == kTail) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    const bool weights = index == kW1 || index == kW2;
    return weights ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return index == kActive ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
};

}  // namespace

const OrtCustomOp* PredictUnitsOp() {
  static const PredictUnitsOpType op;
  return &op;
}

std::unique_ptr<Kernel> PredictUnitsKernelOf(const Node& node) {
  return std::make_unique<PredictUnitsKernel>(node);
}

}  // namespace shadowc
