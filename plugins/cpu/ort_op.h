// SPDX-License-Identifier: Apache-2.0
// What the ONNX Runtime operators share: what a node says, what a call gives and takes, reporting every shape
// problem of a call in one sentence each, the host's thread pool, and turning C++ exceptions into statuses.
#pragma once

#ifndef ORT_API_MANUAL_INIT
#error "compile with ORT_API_MANUAL_INIT: the function table comes from the host, no symbol of it is linked"
#endif
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "parallel.h"
#include "types.h"

namespace shadowc {

// The sizes of a tensor's axes, in place: a call reads a dozen, and none is worth an allocation. Of a tensor
// with more axes than any operand has, the first ones and their true number.
class Shape {
 public:
  static constexpr size_t kMost = 6;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) push_back(size);
  }
  explicit Shape(const Ort::ConstTensorTypeAndShapeInfo& info);

  size_t size() const { return rank_; }
  int64_t operator[](size_t axis) const { return sizes_[axis]; }
  int64_t& operator[](size_t axis) { return sizes_[axis]; }
  void push_back(int64_t size) { sizes_[rank_++] = size; }
  const int64_t* begin() const { return sizes_.data(); }
  const int64_t* end() const { return sizes_.data() + std::min(rank_, kMost); }
  friend bool operator==(const Shape& a, const Shape& b) {
    return a.rank_ == b.rank_ && std::equal(a.begin(), a.end(), b.begin());
  }

 private:
  size_t rank_ = 0;
  std::array<int64_t, kMost> sizes_;
};

std::string ToText(const Shape& shape);

const char* TypeName(ONNXTensorElementDataType type);
// Of an element that an operator makes or a file of weights has.
size_t BytesOf(ONNXTensorElementDataType type);

// Problems found in one call, with the operator and node they belong to. Every call checks: the callers put
// sentences together only where something is wrong.
class Problems {
 public:
  Problems(const char* op, const std::string& node) : op_(op), node_(node) {}

  // Records "NAME must be EXPECTED, found FOUND".
  void Add(const std::string& name, const std::string& expected, const std::string& found);
  void ExpectShape(const char* name, const Shape& found, const Shape& expected, const char* letters);
  // Each ExpectRank or earlier problem makes later arithmetic on the shapes meaningless: stop there.
  void ExpectRank(const char* name, const Shape& found, size_t rank, const char* letters);
  void ThrowIfAny() const;

 private:
  const char* op_;
  const std::string& node_;
  std::vector<std::string> found_;
};

// One tensor input whose type is known.
template <class T>
struct Input {
  const T* data;
  Shape shape;
};

// One of any type; without data where an optional one is not given.
struct AnyInput {
  const void* data = nullptr;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Shape shape;
};

// The packed weights.
struct Weights {
  WeightType type = WeightType::kFloat32;
  const void* data = nullptr;
  Shape shape;
};

// An operator as the graph has it: a node, or one of those that a Chain runs one behind the other
// (ort_chain.cc). It must not outlive the host's call that makes a kernel.
class Node {
 public:
  explicit Node(const Ort::ConstKernelInfo& info);
  // A step of a chain. `inputs`: of each of its inputs the chain's that it is, or, from their number on, one
  // of `stored`, which has to outlive the node, or a number that both lack.
  Node Step(size_t number, std::string name, std::vector<int64_t> inputs,
            const std::vector<AnyInput>* stored) const;

  const std::string& Name() const { return name_; }
  size_t InputCount() const { return inputs_.size(); }
  // Without data unless the input is a constant of the graph.
  AnyInput Constant(size_t index) const;
  // As far as it is known before a call.
  ONNXTensorElementDataType Type(size_t index) const;
  // Of the host's node.
  std::vector<ONNXTensorElementDataType> OutputTypes() const;

  float Float(const char* name, float otherwise) const;
  int64_t Int(const char* name, int64_t otherwise) const;
  std::string Text(const char* name, const char* otherwise) const;
  std::vector<int64_t> Ints(const char* name, const std::vector<int64_t>& otherwise) const;

 private:
  bool Has(size_t index) const;
  // Null unless the input is one of the stored ones.
  const AnyInput* Stored(size_t index) const;

  const Ort::ConstKernelInfo& info_;
  std::string prefix_, name_;
  std::vector<int64_t> inputs_;
  size_t given_;
  const std::vector<AnyInput>* stored_ = nullptr;
};

// What one call of an operator gives and takes.
class Call {
 public:
  Call() = default;
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  virtual ~Call() = default;

  // An input that is no constant; without data where an optional one is not given.
  virtual AnyInput Find(size_t index) = 0;
  // Memory for an output, or null if nobody asks for it.
  virtual void* Give(size_t index, const Shape& shape, ONNXTensorElementDataType type) = 0;
  virtual Parallel Pool() = 0;
};

// The inputs of a node. Those that are constants of the graph (weights, scales, biases, norms) are read once,
// when the session is made: asking the host for an input and its shape costs more than looking at it.
class Inputs {
 public:
  Inputs(const Node& node, size_t most);

  AnyInput Any(Call& call, size_t index) const;

  template <class T>
  Input<T> Read(Call& call, size_t index) const {
    const AnyInput input = Any(call, index);
    constexpr ONNXTensorElementDataType kType = Ort::TypeToTensorType<T>::type;
    if (input.data != nullptr && input.type != kType) ThrowOfType(index, kType, input.type);
    return {static_cast<const T*>(input.data), input.shape};
  }
  Weights ReadWeights(Call& call, size_t index, Problems* problems) const;
  // Checks scores [1 or B, S', L, N] and threshold [1 or B, S', L] against x [B, S, E].
  Selection ReadSelection(Call& call, size_t scores_index, size_t threshold_index, int64_t layer,
                          int64_t batch, int64_t tokens, int64_t units, const char* units_text,
                          Problems* problems) const;
  // The optional norm of an operator, norm_scale and norm_bias [E] from input `index` on. Both or neither.
  Norm ReadNorm(Call& call, size_t index, int64_t width, float epsilon, Problems* problems) const;

 private:
  // The host sees to types, but not between the steps of a chain.
  [[noreturn]] void ThrowOfType(size_t index, ONNXTensorElementDataType expected,
                                ONNXTensorElementDataType found) const;

  std::string node_;
  std::vector<AnyInput> constants_;
};

// Checks w and scales against their rows ([F, 2] or [H, 4, D], which `letters` name) of `width` weights.
void ExpectWeights(const Weights& w, const Shape& scales, Shape rows, int64_t width, const char* letters,
                   Problems* problems);

// Reports an unsupported element type as soon as a session is made, if the type is known by then.
void CheckWeightType(const Node& node, size_t index, Problems* problems);

// An output, or null if the graph does not ask for it.
template <class T>
T* Output(Call& call, size_t index, const Shape& shape) {
  return static_cast<T*>(call.Give(index, shape, Ort::TypeToTensorType<T>::type));
}

void WriteRead(Call& call, size_t index, const ReadCount& read);

// f(), with any exception as a status.
template <class F>
OrtStatus* AsStatus(F&& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const Ort::Exception& e) {
    return Ort::GetApi().CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::exception& e) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, e.what());
  } catch (...) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, "shadowc: unknown exception");
  }
}

// What runs an operator; made once, then called by any number of threads.
class Kernel {
 public:
  Kernel() = default;
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;
  virtual ~Kernel() = default;

  // May throw, as constructors may.
  virtual void Compute(Call& call) const = 0;

  OrtStatusPtr ComputeV2(OrtKernelContext* context) const;
};

template <class Made>
OrtStatusPtr MakeKernel(const OrtKernelInfo* raw, void** kernel) {
  return AsStatus([&] {
    const Ort::ConstKernelInfo info(raw);
    *kernel = new Made(Node(info));
  });
}

// The parts of CustomOpBase that are the same for all of them. `Made` is constructed from a Node.
template <class Op, class Made>
struct OpBase : Ort::CustomOpBase<Op, Made, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return MakeKernel<Made>(info, kernel);
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index < Op::kRequiredInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return index < Op::kRequiredOutputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
};

// Attribute `few_digits` of both sparse operators: whether calls with tokens that are not masked, which is
// what prompts are, may round activations and weights (panels.h); 0 not at all, 1 and 3 freely, 2 finely.
// Constant scores that mask nothing have a tail of one token. Where 1, int4 has one digit in all calls.
Rounding RoundingOf(const Node& node);
Int4Digits Int4DigitsOf(const Node& node);
void CheckFewDigits(const Node& node, Problems* problems);

// Of a norm that a sparse operator takes; the default of ONNX's LayerNormalization.
inline constexpr const char* kEpsilon = "epsilon";
inline constexpr float kDefaultEpsilon = 1e-5f;

// The operators, one per ort_*.cc; they live as long as the library.
const OrtCustomOp* ChainOp();
const OrtCustomOp* MatMulRowsOp();
const OrtCustomOp* PredictUnitsOp();
const OrtCustomOp* SelectThresholdOp();
const OrtCustomOp* SparseAttentionOp();         // cache of float32
const OrtCustomOp* SparseAttentionFloat16Op();  // the same operator, cache of float16
const OrtCustomOp* SparseFfnOp();

// Their kernels, for a chain, and what only chains have.
using KernelOf = std::unique_ptr<Kernel> (*)(const Node& node);
std::unique_ptr<Kernel> ConcatKernelOf(const Node& node);
std::unique_ptr<Kernel> MatMulRowsKernelOf(const Node& node);
std::unique_ptr<Kernel> NextTokenKernelOf(const Node& node);
std::unique_ptr<Kernel> PredictUnitsKernelOf(const Node& node);
std::unique_ptr<Kernel> SelectThresholdKernelOf(const Node& node);
std::unique_ptr<Kernel> SparseAttentionKernelOf(const Node& node);
std::unique_ptr<Kernel> SparseFfnKernelOf(const Node& node);
// ONNX's own operators (ort_standard.cc); null: this one can be no step.
KernelOf StandardKernelOf(const std::string& op);

}  // namespace shadowc
