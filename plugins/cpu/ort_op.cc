// SPDX-License-Identifier: Apache-2.0
#include "ort_op.h"

#include <algorithm>
#include <atomic>
#include <exception>

namespace shadowc {

Shape::Shape(const Ort::ConstTensorTypeAndShapeInfo& info) : rank_(info.GetDimensionsCount()) {
  Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, sizes_.data(), std::min(rank_, kMost)));
}

std::string ToText(const Shape& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + (shape.size() > Shape::kMost ? ", ...]" : "]");
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

void ExpectWeightType(ONNXTensorElementDataType type, WeightType* out, Problems* problems) {
  if (WeightTypeOf(type, out)) return;
  problems->Add("the element type of w", "float32, bfloat16, int8, or uint8 (pairs of int4)", TypeName(type));
}

AnyInput Found(const Ort::ConstValue& value) {
  const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
  return {value.GetTensorRawData(), info.GetElementType(), Shape(info.GetConst())};
}

}  // namespace

Inputs::Inputs(const Ort::ConstKernelInfo& info, size_t most)
    : given_(std::min(info.GetInputCount(), most)), constants_(given_) {
  for (size_t i = 0; i < given_; ++i) {
    int constant = 0;
    const Ort::ConstValue value = info.GetTensorConstantInput(i, &constant);
    if (constant != 0) constants_[i] = Found(value);
  }
}

AnyInput Inputs::Any(const Ort::KernelContext& context, size_t index) const {
  if (index >= given_) return {};
  if (constants_[index].data != nullptr) return constants_[index];
  const Ort::ConstValue value = context.GetInput(index);
  return value ? Found(value) : AnyInput{};
}

Norm Inputs::ReadNorm(const Ort::KernelContext& context, size_t index, int64_t width, float epsilon,
                      Problems* problems) const {
  constexpr const char* kNames[] = {"norm_scale", "norm_bias"};
  const float* found[] = {nullptr, nullptr};
  for (size_t i = 0; i < 2; ++i) {
    const Input<float> input = Read<float>(context, index + i);
    found[i] = input.data;
    if (found[i] != nullptr) problems->ExpectShape(kNames[i], input.shape, {width}, "[E]");
  }
  for (size_t i = 0; i < 2; ++i) {
    if (found[i] != nullptr || found[1 - i] == nullptr) continue;
    problems->Add(kNames[i], std::string("given, as ") + kNames[1 - i] + " is", "nothing");
  }
  return {found[0], found[1], epsilon};
}

Weights Inputs::ReadWeights(const Ort::KernelContext& context, size_t index, Problems* problems) const {
  const AnyInput input = Any(context, index);
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

void CheckWeightType(const Ort::ConstKernelInfo& info, size_t index, Problems* problems) {
  const Ort::TypeInfo type = info.GetInputTypeInfo(index);
  if (type.GetONNXType() != ONNX_TYPE_TENSOR) return;
  WeightType unused;
  ExpectWeightType(type.GetTensorTypeAndShapeInfo().GetElementType(), &unused, problems);
}

Selection Inputs::ReadSelection(const Ort::KernelContext& context, size_t scores_index,
                                size_t threshold_index, int64_t layer, int64_t batch, int64_t tokens,
                                int64_t units, const char* units_text, Problems* problems) const {
  const Input<float> scores = Read<float>(context, scores_index);
  const Input<float> threshold = Read<float>(context, threshold_index);
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

void WriteRead(const Ort::KernelContext& context, size_t index, const ReadCount& read) {
  int64_t* out = Output<int64_t>(context, index, {2});
  if (out == nullptr) return;
  out[0] = read.records;
  out[1] = read.bytes;
}

namespace {

// A body whose exceptions stay inside: the host's pool knows none, and a worker that never reports back would
// hang the call.
struct Guarded {
  Parallel::Body body;
  void* closure;
  std::atomic<bool> failed{false};
  std::exception_ptr first = nullptr;

  static void Run(void* self, size_t index) noexcept {
    Guarded& guarded = *static_cast<Guarded*>(self);
    if (guarded.failed.load(std::memory_order_relaxed)) return;
    try {
      guarded.body(guarded.closure, index);
    } catch (...) {
      if (!guarded.failed.exchange(true)) guarded.first = std::current_exception();
    }
  }
};

}  // namespace

Parallel HostPool(OrtKernelContext* context) {
  const auto run = [](void* pool, size_t total, Parallel::Body body, void* closure) {
    Guarded guarded{body, closure};
    // num_batch 0: one index at a time to whichever thread is free, so a disturbed thread does not hold up
    // the rest.
    Ort::ThrowOnError(Ort::GetApi().KernelContext_ParallelFor(static_cast<OrtKernelContext*>(pool),
                                                              &Guarded::Run, total, 0, &guarded));
    if (guarded.first) std::rethrow_exception(guarded.first);
  };
  return Parallel(run, context);
}

float FloatAttribute(const Ort::ConstKernelInfo& info, const char* name, float otherwise) {
  float value = 0.0f;
  const Ort::Status status(Ort::GetApi().KernelInfoGetAttribute_float(info, name, &value));
  return status.IsOK() ? value : otherwise;
}

int64_t IntAttribute(const Ort::ConstKernelInfo& info, const char* name, int64_t otherwise) {
  int64_t value = 0;
  const Ort::Status status(Ort::GetApi().KernelInfoGetAttribute_int64(info, name, &value));
  return status.IsOK() ? value : otherwise;
}

Rounding RoundingOf(const Ort::ConstKernelInfo& info) {
  const int64_t few_digits = IntAttribute(info, "few_digits", 0);
  if (few_digits == 0) return Rounding::kNone;
  return few_digits == 2 ? Rounding::kFinely : Rounding::kFreely;
}

std::string TextAttribute(const Ort::ConstKernelInfo& info, const char* name, const char* otherwise) {
  size_t size = 0;
  Ort::Status status(Ort::GetApi().KernelInfoGetAttribute_string(info, name, nullptr, &size));
  if (!status.IsOK()) return otherwise;
  std::string value(size, '\0');
  Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAttribute_string(info, name, value.data(), &size));
  value.resize(size > 0 ? size - 1 : 0);  // the size counts the terminating zero
  return value;
}

std::vector<int64_t> IntsAttribute(const Ort::ConstKernelInfo& info, const char* name,
                                   const std::vector<int64_t>& otherwise) {
  size_t size = 0;
  const Ort::Status status(Ort::GetApi().KernelInfoGetAttributeArray_int64(info, name, nullptr, &size));
  if (!status.IsOK()) return otherwise;
  std::vector<int64_t> values(size);
  if (size != 0)
    Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAttributeArray_int64(info, name, values.data(), &size));
  return values;
}

}  // namespace shadowc
