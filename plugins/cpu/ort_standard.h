// SPDX-License-Identifier: Apache-2.0
// What those of ONNX's own operators share that can be steps of a chain.
#pragma once

#include <string>

#include "ort_op.h"

namespace shadowc {

inline size_t CountOf(const Shape& shape) {
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  return count;
}

// What every such step is made of.
class StandardKernel : public Kernel {
 public:
  StandardKernel(const char* op, const Node& node) : op_(op), node_(node.Name()), inputs_(node, kMost) {}

 protected:
  static constexpr size_t kMost = 5;

  Problems NoProblems() const { return {op_, node_}; }
  AnyInput Any(Call& call, size_t index) const {
    const AnyInput input = inputs_.Any(call, index);
    const bool given = input.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (given && input.shape.size() <= Shape::kMost) return input;
    Problems problems = NoProblems();
    problems.Add("input " + std::to_string(index), "of at most " + std::to_string(Shape::kMost) + " axes",
                 given ? ToText(input.shape) : "nothing");
    problems.ThrowIfAny();
    return input;
  }
  template <class T>
  Input<T> Read(Call& call, size_t index) const {
    return inputs_.Read<T>(call, index);
  }
  // A single number.
  int64_t ReadOne(Call& call, size_t index, const char* name) const {
    const Input<int64_t> input = Read<int64_t>(call, index);
    Problems problems = NoProblems();
    problems.ExpectShape(name, input.shape, {1}, "[1]");
    problems.ThrowIfAny();
    return input.data[0];
  }
  size_t AxisOf(int64_t axis, const Shape& shape) const {
    const int64_t rank = static_cast<int64_t>(shape.size()), found = axis < 0 ? axis + rank : axis;
    Problems problems = NoProblems();
    if (found < 0 || found >= rank) problems.Add("axis", "one of " + ToText(shape), std::to_string(axis));
    problems.ThrowIfAny();
    return static_cast<size_t>(found);
  }

  const char* op_;
  std::string node_;
  Inputs inputs_;
};

// Null: it is none of those that go element by element (ort_elementwise.cc).
KernelOf ElementwiseKernelOf(const std::string& op);

}  // namespace shadowc
