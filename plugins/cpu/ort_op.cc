// SPDX-License-Identifier: Apache-2.0
#include "ort_op.h"

#include <algorithm>
#include <numeric>

namespace shadowc {

Shape::Shape(const Ort::ConstTensorTypeAndShapeInfo& info) : rank_(info.GetDimensionsCount()) {
  Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, sizes_.data(), std::min(rank_, kMost)));
}

std::string ToText(const Shape& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + (shape.size() > Shape::kMost ? ", ...]" : "]");
}

const char* TypeName(ONNXTensorElementDataType type) {
  static const char* const kNames[] = {
      "undefined", "float32", "uint8",   "int8",   "uint16", "int16",     "int32",      "int64",   "string",
      "bool",      "float16", "float64", "uint32", "uint64", "complex64", "complex128", "bfloat16"};
  const size_t i = static_cast<size_t>(type);
  if (i < sizeof(kNames) / sizeof(kNames[0])) return kNames[i];
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4) return "uint4";
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4) return "int4";
  return "a float8 type";
}

size_t BytesOf(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return sizeof(int64_t);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return sizeof(float);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return sizeof(uint16_t);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
      return sizeof(uint8_t);
    default:
      throw Ort::Exception(std::string("no operator has elements of type ") + TypeName(type),
                           ORT_INVALID_ARGUMENT);
  }
}

void Problems::Add(const std::string& name, const std::string& expected, const std::string& found) {
  found_.push_back(name + " must be " + expected + ", found " + found);
}

void Problems::ExpectShape(const char* name, const Shape& found, const Shape& expected, const char* letters) {
  if (found == expected) return;
  Add(name, std::string(letters) + " = " + ToText(expected), ToText(found));
}

void Problems::ExpectRank(const char* name, const Shape& found, size_t rank, const char* letters) {
  if (found.size() != rank) Add(name, letters, ToText(found));
}

void Problems::ThrowIfAny() const {
  if (found_.empty()) return;
  std::string text = std::string(op_) + " node '" + node_ + "': ";
  for (size_t i = 0; i < found_.size(); ++i) text += (i == 0 ? "" : "; ") + found_[i];
  throw Ort::Exception(std::move(text), ORT_INVALID_ARGUMENT);
}

namespace {

bool WeightTypeOf(ONNXTensorElementDataType type, WeightType* out) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      *out = WeightType::kFloat32;
      return true;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      *out = WeightType::kBFloat16;
      return true;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
      *out = WeightType::kInt4;
      return true;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      *out = WeightType::kInt8;
      return true;
    default:
      return false;
  }
}

void ExpectWeightType(ONNXTensorElementDataType type, WeightType* out, Problems* problems) {
  if (WeightTypeOf(type, out)) return;
  problems->Add("the element type of w", "float32, bfloat16, int8, or uint8 (pairs of int4)", TypeName(type));
}

AnyInput Found(const Ort::ConstValue& value) {
  const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
  return {value.GetTensorRawData(), info.GetElementType(), Shape(info.GetConst())};
}

}  // namespace

Node::Node(const Ort::ConstKernelInfo& info)
    : info_(info), name_(info.GetNodeName()), inputs_(info.GetInputCount()), given_(inputs_.size()) {
  std::iota(inputs_.begin(), inputs_.end(), 0);
}

Node Node::Step(size_t number, std::string name, std::vector<int64_t> inputs,
                const std::vector<AnyInput>* stored) const {
  Node step(*this);
  step.stored_ = stored;
  step.prefix_ = std::to_string(number) + ".";
  step.name_ = std::move(name);
  step.inputs_ = std::move(inputs);
  return step;
}

bool Node::Has(size_t index) const {
  return index < inputs_.size() && inputs_[index] >= 0 && static_cast<size_t>(inputs_[index]) < given_;
}

const AnyInput* Node::Stored(size_t index) const {
  if (stored_ == nullptr || index >= inputs_.size() || inputs_[index] < static_cast<int64_t>(given_))
    return nullptr;
  const size_t number = static_cast<size_t>(inputs_[index]) - given_;
  return number < stored_->size() ? &(*stored_)[number] : nullptr;
}

AnyInput Node::Constant(size_t index) const {
  if (const AnyInput* stored = Stored(index)) return *stored;
  if (!Has(index)) return {};
  int constant = 0;
  const Ort::ConstValue value = info_.GetTensorConstantInput(static_cast<size_t>(inputs_[index]), &constant);
  return constant != 0 ? Found(value) : AnyInput{};
}

ONNXTensorElementDataType Node::Type(size_t index) const {
  if (const AnyInput* stored = Stored(index)) return stored->type;
  if (!Has(index)) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  const Ort::TypeInfo type = info_.GetInputTypeInfo(static_cast<size_t>(inputs_[index]));
  if (type.GetONNXType() != ONNX_TYPE_TENSOR) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  return type.GetTensorTypeAndShapeInfo().GetElementType();
}

std::vector<ONNXTensorElementDataType> Node::OutputTypes() const {
  std::vector<ONNXTensorElementDataType> types;
  for (size_t i = 0; i < info_.GetOutputCount(); ++i)
    types.push_back(info_.GetOutputTypeInfo(i).GetTensorTypeAndShapeInfo().GetElementType());
  return types;
}

Inputs::Inputs(const Node& node, size_t most)
    : node_(node.Name()), constants_(std::min(node.InputCount(), most)) {
  for (size_t i = 0; i < constants_.size(); ++i) constants_[i] = node.Constant(i);
}

AnyInput Inputs::Any(Call& call, size_t index) const {
  if (index >= constants_.size()) return {};
  return constants_[index].data != nullptr ? constants_[index] : call.Find(index);
}

void Inputs::ThrowOfType(size_t index, ONNXTensorElementDataType expected,
                         ONNXTensorElementDataType found) const {
  throw Ort::Exception("node '" + node_ + "': input " + std::to_string(index) + " must be " +
                           TypeName(expected) + ", found " + TypeName(found),
                       ORT_INVALID_ARGUMENT);
}

Norm Inputs::ReadNorm(Call& call, size_t index, int64_t width, float epsilon, Problems* problems) const {
  constexpr const char* kNames[] = {"norm_scale", "norm_bias"};
  const float* found[] = {nullptr, nullptr};
  for (size_t i = 0; i < 2; ++i) {
    const Input<float> input = Read<float>(call, index + i);
    found[i] = input.data;
    if (found[i] != nullptr) problems->ExpectShape(kNames[i], input.shape, {width}, "[E]");
  }
  for (size_t i = 0; i < 2; ++i) {
    if (found[i] != nullptr || found[1 - i] == nullptr) continue;
    problems->Add(kNames[i], std::string("given, as ") + kNames[1 - i] + " is", "nothing");
  }
  return {found[0], found[1], epsilon};
}

Weights Inputs::ReadWeights(Call& call, size_t index, Problems* problems) const {
  const AnyInput input = Any(call, index);
  Weights weights;
  ExpectWeightType(input.type, &weights.type, problems);
  weights.data = input.data;
  weights.shape = input.shape;
  return weights;
}

void ExpectWeights(const Weights& w, const Shape& scales, Shape rows, int64_t width, const char* letters,
                   Problems* problems) {
  constexpr int64_t kGroup = static_cast<int64_t>(kInt4Group);
  const bool int4 = w.type == WeightType::kInt4, split = int4 && width % kGroup != 0;
  Shape scale_rows = rows;
  if (int4) scale_rows.push_back(width / kGroup);
  rows.push_back(int4 ? width / 2 : width);
  if (scales == scale_rows && w.shape == rows && !split) return;
  const std::string open = std::string("[") + letters, group = std::to_string(kGroup);
  if (split)
    problems->Add("E (axis 2 of x)", "a multiple of " + group + ", the group of int4 weights",
                  std::to_string(width));
  problems->ExpectShape("scales", scales, scale_rows, (open + (int4 ? ", E / " + group : "") + "]").c_str());
  problems->ExpectShape("w", w.shape, rows, (open + (int4 ? ", E / 2]" : ", E]")).c_str());
}

void CheckWeightType(const Node& node, size_t index, Problems* problems) {
  const ONNXTensorElementDataType type = node.Type(index);
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return;
  WeightType unused;
  ExpectWeightType(type, &unused, problems);
}

Selection Inputs::ReadSelection(Call& call, size_t scores_index, size_t threshold_index, int64_t layer,
                                int64_t batch, int64_t tokens, int64_t units, const char* units_text,
                                Problems* problems) const {
  const Input<float> scores = Read<float>(call, scores_index);
  const Input<float> threshold = Read<float>(call, threshold_index);
  problems->ExpectRank("scores", scores.shape, 4, "[1 or B, S', L, N]");
  problems->ExpectRank("threshold", threshold.shape, 3, "[1 or B, S', L]");
  problems->ThrowIfAny();
  const int64_t tail = scores.shape[1], layers = scores.shape[2];
  const auto expect_batch = [&](const char* name, int64_t found) {
    if (found == 1 || found == batch) return;
    problems->Add(name, "1 or " + std::to_string(batch) + " (that of x)", std::to_string(found));
  };
  expect_batch("the batch of scores", scores.shape[0]);
  expect_batch("the batch of threshold", threshold.shape[0]);
  if (threshold.shape[1] != tail || threshold.shape[2] != layers)
    problems->Add("threshold",
                  "[1 or B, " + std::to_string(tail) + ", " + std::to_string(layers) + "] as scores are " +
                      ToText(scores.shape),
                  ToText(threshold.shape));
  if (tail > tokens && tokens != 0)
    problems->Add("S' (axis 1 of scores)", "at most S = " + std::to_string(tokens) + " (axis 1 of x)",
                  std::to_string(tail));
  if (layer < 0 || layer >= layers)
    problems->Add("attribute layer", "in 0 ... " + std::to_string(layers - 1) + " (axis 2 of scores)",
                  std::to_string(layer));
  if (scores.shape[3] != units)
    problems->Add("N (axis 3 of scores)", std::to_string(units) + " (" + units_text + ")",
                  std::to_string(scores.shape[3]));
  Selection selection;
  selection.scores = scores.data;
  selection.threshold = threshold.data;
  selection.scores_batch = static_cast<size_t>(scores.shape[0]);
  selection.threshold_batch = static_cast<size_t>(threshold.shape[0]);
  selection.tail = static_cast<size_t>(tail);
  selection.layers = static_cast<size_t>(layers);
  selection.units = static_cast<size_t>(units);
  selection.layer = static_cast<size_t>(layer);
  return selection;
}

void WriteRead(Call& call, size_t index, const ReadCount& read) {
  int64_t* out = Output<int64_t>(call, index, {2});
  if (out == nullptr) return;
  out[0] = read.records;
  out[1] = read.bytes;
}

namespace {

class HostCall : public Call {
 public:
  explicit HostCall(OrtKernelContext* raw) : raw_(raw), context_(raw) {}

  AnyInput Find(size_t index) override {
    const Ort::ConstValue value = context_.GetInput(index);
    return value ? Found(value) : AnyInput{};
  }
  void* Give(size_t index, const Shape& shape, ONNXTensorElementDataType) override {
    Ort::UnownedValue value = context_.GetOutput(index, shape.begin(), shape.size());
    return value ? value.GetTensorMutableRawData() : nullptr;
  }
  // The intra-op pool of the session that runs the kernel.
  Parallel Pool() override {
    const auto run = [](void* pool, size_t total, Parallel::Body body, void* closure) {
      Guarded guarded(body, closure);
      // num_batch 0: one index at a time to whichever thread is free, so a disturbed thread does not hold up
      // the rest.
      Ort::ThrowOnError(Ort::GetApi().KernelContext_ParallelFor(static_cast<OrtKernelContext*>(pool),
                                                                &Guarded::Run, total, 0, &guarded));
      guarded.Rethrow();
    };
    return Parallel(run, raw_);
  }

 private:
  OrtKernelContext* raw_;
  Ort::KernelContext context_;
};

}  // namespace

OrtStatusPtr Kernel::ComputeV2(OrtKernelContext* context) const {
  return AsStatus([&] {
    HostCall call(context);
    Compute(call);
  });
}

float Node::Float(const char* name, float otherwise) const {
  float value = 0.0f;
  const Ort::Status status(
      Ort::GetApi().KernelInfoGetAttribute_float(info_, (prefix_ + name).c_str(), &value));
  return status.IsOK() ? value : otherwise;
}

int64_t Node::Int(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  const Ort::Status status(
      Ort::GetApi().KernelInfoGetAttribute_int64(info_, (prefix_ + name).c_str(), &value));
  return status.IsOK() ? value : otherwise;
}

std::string Node::Text(const char* name, const char* otherwise) const {
  const std::string full = prefix_ + name;
  size_t size = 0;
  Ort::Status status(Ort::GetApi().KernelInfoGetAttribute_string(info_, full.c_str(), nullptr, &size));
  if (!status.IsOK()) return otherwise;
  std::string value(size, '\0');
  Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAttribute_string(info_, full.c_str(), value.data(), &size));
  value.resize(size > 0 ? size - 1 : 0);  // the size counts the terminating zero
  return value;
}

std::vector<int64_t> Node::Ints(const char* name, const std::vector<int64_t>& otherwise) const {
  const std::string full = prefix_ + name;
  const OrtApi& api = Ort::GetApi();
  size_t size = 0;
  const Ort::Status status(api.KernelInfoGetAttributeArray_int64(info_, full.c_str(), nullptr, &size));
  if (!status.IsOK()) return otherwise;
  std::vector<int64_t> values(size);
  if (size != 0)
    Ort::ThrowOnError(api.KernelInfoGetAttributeArray_int64(info_, full.c_str(), values.data(), &size));
  return values;
}

Rounding RoundingOf(const Node& node) {
  const int64_t few_digits = node.Int("few_digits", 0);
  if (few_digits == 0) return Rounding::kNone;
  return few_digits == 2 ? Rounding::kFinely : Rounding::kFreely;
}

void CheckFewDigits(const Node& node, Problems* problems) {
  const int64_t few_digits = node.Int("few_digits", 0);
  if (few_digits < 0 || few_digits > 3)
    problems->Add("attribute few_digits", "0 to 3", std::to_string(few_digits));
}

Int4Digits Int4DigitsOf(const Node& node) {
  return node.Int("few_digits", 0) == 1 ? Int4Digits::kOne : Int4Digits::kThree;
}

}  // namespace shadowc
