// SPDX-License-Identifier: Apache-2.0
// The inputs and outputs of an operator as a table, and the checks of types and shapes that follow from it.
//
// A shape is one letter per axis: B batch, S new tokens, Z sparse tail, E hidden, H heads, D head size, T
// cache capacity, F neurons, N units and L layers of the mask, M batch of the mask (1 or B), R rows (H * D);
// a digit is that size. The same letter is the same size in all operands of a node.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace shadowc::trt {

struct Operand {
  // kActivation: float32, float16 or bfloat16, one for the node; kWeight: that type or int8, one for the
  // node.
  enum class Type : uint8_t { kActivation, kWeight, kFloat, kInt32, kInt64 } type;
  const char* name;
  const char* shape;
  int aliases = -1;  // outputs: the input whose memory it shares
};

struct Signature {
  const char* op;
  std::vector<Operand> inputs, outputs;

  const Operand& At(int position) const;  // inputs, then outputs
};

inline constexpr int64_t kUnknown = -1;

// The size behind each letter, kUnknown until it is known.
class Sizes {
 public:
  Sizes() {
    for (int64_t& size : sizes_) size = kUnknown;
  }
  int64_t operator[](char letter) const { return sizes_[letter - 'A']; }
  int Int(char letter) const { return static_cast<int>(sizes_[letter - 'A']); }
  void Set(char letter, int64_t size) { sizes_[letter - 'A'] = size; }

 private:
  int64_t sizes_[26];
};

// "B = 4, S = 1": the known sizes.
std::string ToText(const Sizes& sizes);

// One shape of a node's operands, kUnknown where dynamic.
using Extents = std::vector<int64_t>;

// Reads the sizes out of the inputs' shapes. Reports wrong counts and ranks and letters that disagree, each
// with where, name, expected and found; returns whether all fit.
bool BindShapes(const std::string& where, const Signature& signature, const std::vector<Extents>& shapes,
                Sizes* sizes);

// The sizes in inputs that were checked before. Does not allocate.
Sizes ReadSizes(const Signature& signature, const nvinfer1::PluginTensorDesc* inputs);

// Whether the tensor at `position` may have the type `types[position]`, given those before it. With `where`,
// a refusal is reported.
bool TypeFits(const std::string* where, const Signature& signature, const nvinfer1::DataType* types,
              int position);

// Index of the first input of this kind (signatures have one).
int FirstOf(const Signature& signature, Operand::Type type);

const char* Name(nvinfer1::DataType type);

// The kernels' name for a type that TypeFits accepts for activations and weights.
shadowc_dtype KernelType(nvinfer1::DataType type);

}  // namespace shadowc::trt
