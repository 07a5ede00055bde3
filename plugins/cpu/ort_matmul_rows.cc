// SPDX-License-Identifier: Apache-2.0
// MatMulRows as an ONNX Runtime operator: checks shapes, then calls the kernel (matmul_rows.h).
#include "matmul_rows.h"
#include "ort_op.h"

namespace shadowc {
namespace {

constexpr const char* kName = "MatMulRows";
enum In : size_t { kX, kW, kScales, kInputs };

class MatMulRowsKernel : public Kernel {
 public:
  explicit MatMulRowsKernel(const Node& node) : node_(node.Name()), inputs_(node, kInputs) {}

 private:
  void Compute(Call& call) const override {
    Problems problems(kName, node_);
    const Input<float> x = inputs_.Read<float>(call, kX), scales = inputs_.Read<float>(call, kScales);
    const Input<int8_t> w = inputs_.Read<int8_t>(call, kW);
    problems.ExpectRank("x", x.shape, 3, "[B, S, E]");
    problems.ExpectRank("w", w.shape, 2, "[N, E]");
    problems.ThrowIfAny();
    if (x.shape[2] < 1) problems.Add("E (axis 2 of x)", "at least 1", "0");
    problems.ExpectShape("w", w.shape, {w.shape[0], x.shape[2]}, "[N, E]");
    problems.ExpectShape("scales", scales.shape, {w.shape[0]}, "[N]");
    problems.ThrowIfAny();
    MatMulRowsArgs a{};
    a.x = x.data;
    a.rows = static_cast<size_t>(x.shape[0] * x.shape[1]);
    a.width = static_cast<size_t>(x.shape[2]);
    a.w = w.data;
    a.scales = scales.data;
    a.outputs = static_cast<size_t>(w.shape[0]);
    a.y = Output<float>(call, 0, {x.shape[0], x.shape[1], w.shape[0]});
    shadowc::MatMulRows(a, call.Pool());
  }

  std::string node_;
  Inputs inputs_;
};

struct MatMulRowsOpType : OpBase<MatMulRowsOpType, MatMulRowsKernel> {
  static constexpr size_t kRequiredInputs = kInputs, kRequiredOutputs = 1;
  const char* GetName() const { return kName; }
  size_t GetInputTypeCount() const { return kInputs; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == kW ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

}  // namespace

const OrtCustomOp* MatMulRowsOp() {
  static const MatMulRowsOpType op;
  return &op;
}

std::unique_ptr<Kernel> MatMulRowsKernelOf(const Node& node) {
  return std::make_unique<MatMulRowsKernel>(node);
}

}  // namespace shadowc
