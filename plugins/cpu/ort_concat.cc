// SPDX-License-Identifier: Apache-2.0
// ONNX's Concat as a step of a chain: what the operators of all layers count leaves it as one value. The host
// has to be asked for every output, and a large engine has a hundred of them.
#include <cstddef>
#include <cstring>

#include "ort_op.h"

namespace shadowc {
namespace {

class ConcatKernel : public Kernel {
 public:
  explicit ConcatKernel(const Node& node)
      : node_(node.Name()), count_(node.InputCount()), inputs_(node, count_), axis_(node.Int("axis", 0)) {}

 private:
  void Compute(Call& call) const override {
    const AnyInput first = inputs_.Any(call, 0);
    const size_t axis = AxisOf(first.shape);
    const Shape joint = JointShape(call, first, axis);
    size_t outer = 1, inner = BytesOf(first.type);  // of what has one index of the axis
    for (size_t i = 0; i < joint.size(); ++i) {
      if (i != axis) (i < axis ? outer : inner) *= static_cast<size_t>(joint[i]);
    }
    const size_t stride = static_cast<size_t>(joint[axis]) * inner;
    std::byte* to = static_cast<std::byte*>(call.Give(0, joint, first.type));
    if (outer == 0 || stride == 0) return;
    for (size_t n = 0; n < count_; ++n) {
      const AnyInput part = inputs_.Any(call, n);
      const std::byte* from = static_cast<const std::byte*>(part.data);
      const size_t width = static_cast<size_t>(part.shape[axis]) * inner;
      for (size_t i = 0; i < outer && width != 0; ++i) std::memcpy(to + i * stride, from + i * width, width);
      to += width;
    }
  }

  size_t AxisOf(const Shape& shape) const {
    const int64_t rank = static_cast<int64_t>(shape.size()), axis = axis_ < 0 ? axis_ + rank : axis_;
    Problems problems("Concat", node_);
    if (shape.size() > Shape::kMost)
      problems.Add("input 0", "of at most " + std::to_string(Shape::kMost) + " axes", ToText(shape));
    if (axis < 0 || axis >= rank)
      problems.Add("attribute axis", "an axis of input 0, " + ToText(shape), std::to_string(axis_));
    problems.ThrowIfAny();
    return static_cast<size_t>(axis);
  }

  Shape JointShape(Call& call, const AnyInput& first, size_t axis) const {
    Problems problems("Concat", node_);
    int64_t along = 0;
    for (size_t n = 0; n < count_; ++n) {
      const AnyInput part = inputs_.Any(call, n);
      Shape like = first.shape;
      if (part.shape.size() == like.size()) {
        like[axis] = part.shape[axis];
        along += part.shape[axis];
      }
      if (part.type != first.type)
        problems.Add("the type of input " + std::to_string(n),
                     std::string("that of input 0, ") + TypeName(first.type), TypeName(part.type));
      else if (!(part.shape == like))
        problems.Add("input " + std::to_string(n), ToText(like) + ", as input 0 but for the axis",
                     ToText(part.shape));
    }
    problems.ThrowIfAny();
    Shape joint = first.shape;
    joint[axis] = along;
    return joint;
  }

  std::string node_;
  size_t count_;
  Inputs inputs_;
  int64_t axis_;
};

}  // namespace

std::unique_ptr<Kernel> ConcatKernelOf(const Node& node) { return std::make_unique<ConcatKernel>(node); }

}  // namespace shadowc
