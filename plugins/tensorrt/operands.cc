// SPDX-License-Identifier: Apache-2.0
#include "operands.h"

#include <cstring>

#include "log.h"

namespace shadowc::trt {
namespace {

using nvinfer1::DataType;

bool IsDigit(char letter) { return letter >= '0' && letter <= '9'; }

// "[B, S, E]"
std::string Letters(const char* shape) {
  std::string text = "[";
  for (const char* letter = shape; *letter != '\0'; ++letter)
    text += (letter == shape ? "" : ", ") + std::string(1, *letter);
  return text + "]";
}

std::string ToText(const Extents& shape) {
  std::string text = "[";
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    text +=
        (axis == 0 ? "" : ", ") + (shape[axis] == kUnknown ? std::string("?") : std::to_string(shape[axis]));
  }
  return text + "]";
}

std::string Expected(const Signature& signature, const Operand& operand) {
  if (operand.type == Operand::Type::kFloat) return "float32";
  if (operand.type == Operand::Type::kInt32) return "int32";
  if (operand.type == Operand::Type::kInt64) return "int64";
  const int first = FirstOf(signature, operand.type);
  if (&operand != &signature.inputs[static_cast<size_t>(first)]) {
    return std::string("the type of ") + signature.inputs[static_cast<size_t>(first)].name;
  }
  return operand.type == Operand::Type::kActivation ? "float32, float16 or bfloat16"
                                                    : "the type of x, or int8";
}

bool IsActivation(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

bool Fits(const Signature& signature, const DataType* types, int position) {
  const Operand& operand = signature.At(position);
  const DataType type = types[position];
  switch (operand.type) {
    case Operand::Type::kFloat:
      return type == DataType::kFLOAT;
    case Operand::Type::kInt32:
      return type == DataType::kINT32;
    case Operand::Type::kInt64:
      return type == DataType::kINT64;
    case Operand::Type::kActivation:
      break;
    case Operand::Type::kWeight:
      break;
  }
  const int first = FirstOf(signature, operand.type);
  if (position != first) return type == types[first];
  if (operand.type == Operand::Type::kActivation) return IsActivation(type);
  return type == DataType::kINT8 || type == types[FirstOf(signature, Operand::Type::kActivation)];
}

}  // namespace

const Operand& Signature::At(int position) const {
  const size_t at = static_cast<size_t>(position);
  return at < inputs.size() ? inputs[at] : outputs[at - inputs.size()];
}

int FirstOf(const Signature& signature, Operand::Type type) {
  size_t at = 0;
  while (at + 1 < signature.inputs.size() && signature.inputs[at].type != type) ++at;
  return static_cast<int>(at);
}

std::string ToText(const Sizes& sizes) {
  std::string text;
  for (char letter = 'A'; letter <= 'Z'; ++letter) {
    if (sizes[letter] == kUnknown) continue;
    text += (text.empty() ? "" : ", ") + std::string(1, letter) + " = " + std::to_string(sizes[letter]);
  }
  return text;
}

bool BindShapes(const std::string& where, const Signature& signature, const std::vector<Extents>& shapes,
                Sizes* sizes) {
  if (shapes.size() != signature.inputs.size()) {
    Error(where + ": expected " + std::to_string(signature.inputs.size()) + " inputs, found " +
          std::to_string(shapes.size()));
    return false;
  }
  bool good = true;
  const char* source[26] = {};
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Operand& operand = signature.inputs[i];
    const std::string input = where + ": input " + operand.name + " " + Letters(operand.shape);
    if (shapes[i].size() != std::strlen(operand.shape)) {
      Error(input + ": expected " + std::to_string(std::strlen(operand.shape)) + " axes, found " +
            ToText(shapes[i]));
      good = false;
      continue;
    }
    for (size_t axis = 0; axis < shapes[i].size(); ++axis) {
      const char letter = operand.shape[axis];
      const int64_t found = shapes[i][axis];
      if (found == kUnknown) continue;
      if (!IsDigit(letter) && (*sizes)[letter] == kUnknown) {
        sizes->Set(letter, found);
        source[letter - 'A'] = operand.name;
        continue;
      }
      const int64_t expected = IsDigit(letter) ? letter - '0' : (*sizes)[letter];
      if (found == expected) continue;
      Error(input + ": expected " + std::string(1, letter) + " = " + std::to_string(expected) +
            (IsDigit(letter) ? "" : std::string(" as in ") + source[letter - 'A']) + ", found " +
            ToText(shapes[i]));
      good = false;
    }
  }
  return good;
}

Sizes ReadSizes(const Signature& signature, const nvinfer1::PluginTensorDesc* inputs) {
  Sizes sizes;
  for (size_t i = 0; i < signature.inputs.size(); ++i) {
    const char* shape = signature.inputs[i].shape;
    for (int32_t axis = 0; axis < inputs[i].dims.nbDims && shape[axis] != '\0'; ++axis) {
      if (!IsDigit(shape[axis])) sizes.Set(shape[axis], inputs[i].dims.d[axis]);
    }
  }
  return sizes;
}

bool TypeFits(const std::string* where, const Signature& signature, const DataType* types, int position) {
  if (Fits(signature, types, position)) return true;
  if (where == nullptr) return false;
  const Operand& operand = signature.At(position);
  const bool input = static_cast<size_t>(position) < signature.inputs.size();
  Error(*where + ": " + (input ? "input " : "output ") + operand.name + ": expected " +
        Expected(signature, operand) + ", found " + Name(types[position]));
  return false;
}

const char* Name(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT8:
      return "int8";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    case DataType::kBOOL:
      return "bool";
    case DataType::kUINT8:
      return "uint8";
    default:
      return "another type";
  }
}

shadowc_dtype KernelType(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return SHADOWC_F16;
    case DataType::kBF16:
      return SHADOWC_BF16;
    case DataType::kINT8:
      return SHADOWC_I8;
    default:
      return SHADOWC_F32;
  }
}

}  // namespace shadowc::trt
