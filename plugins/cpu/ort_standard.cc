// SPDX-License-Identifier: Apache-2.0
// ONNX's own operators as steps of a chain, as far as what runs once per token has them: around a chain each
// would be a node, and take the host some 10 us. What they take less of than ONNX allows, standard_steps.py
// knows.
#include <algorithm>
#include <cstring>

#include "layer_norm.h"
#include "ort_standard.h"

namespace shadowc {
namespace {

// Of an axis of `size`, from one index to another; those below 0 count from the end.
struct Part {
  int64_t first, count;
};
Part PartOf(int64_t start, int64_t end, int64_t size) {
  const auto bound = [=](int64_t at) { return std::clamp(at < 0 ? at + size : at, int64_t{0}, size); };
  return {bound(start), std::max(bound(end) - bound(start), int64_t{0})};
}

// Rows of a table: data [N, E], indices of any shape.
class GatherKernel : public StandardKernel {
 public:
  explicit GatherKernel(const Node& node) : StandardKernel("Gather", node) {}

 private:
  void Compute(Call& call) const override {
    const AnyInput data = Any(call, 0);
    Any(call, 1);
    const Input<int64_t> indices = Read<int64_t>(call, 1);
    Problems problems = NoProblems();
    problems.ExpectRank("data", data.shape, 2, "[N, E]");
    if (indices.shape.size() >= Shape::kMost) problems.Add("indices", "of fewer axes", ToText(indices.shape));
    problems.ThrowIfAny();
    Shape shape = indices.shape;
    shape.push_back(data.shape[1]);
    const size_t row = static_cast<size_t>(data.shape[1]) * BytesOf(data.type),
                 count = CountOf(indices.shape);
    std::byte* to = static_cast<std::byte*>(call.Give(0, shape, data.type));
    for (size_t i = 0; i < count; ++i) {
      const int64_t index = indices.data[i] < 0 ? indices.data[i] + data.shape[0] : indices.data[i];
      if (index < 0 || index >= data.shape[0])
        problems.Add("indices", "within " + std::to_string(data.shape[0]) + " rows",
                     std::to_string(indices.data[i]));
      problems.ThrowIfAny();
      const std::byte* from = static_cast<const std::byte*>(data.data) + static_cast<size_t>(index) * row;
      if (row != 0) std::memcpy(to + i * row, from, row);
    }
  }
};

// From `starts` to `ends` of one axis.
class SliceKernel : public StandardKernel {
 public:
  explicit SliceKernel(const Node& node) : StandardKernel("Slice", node) {}

 private:
  void Compute(Call& call) const override {
    const AnyInput x = Any(call, 0);
    const size_t axis = AxisOf(ReadOne(call, 3, "axes"), x.shape);
    const int64_t size = x.shape[axis];
    const Part part = PartOf(ReadOne(call, 1, "starts"), ReadOne(call, 2, "ends"), size);
    Shape shape = x.shape;
    shape[axis] = part.count;
    size_t outer = 1, inner = BytesOf(x.type);
    for (size_t i = 0; i < shape.size(); ++i) {
      if (i != axis) (i < axis ? outer : inner) *= static_cast<size_t>(shape[i]);
    }
    std::byte* to = static_cast<std::byte*>(call.Give(0, shape, x.type));
    const std::byte* data = static_cast<const std::byte*>(x.data) + static_cast<size_t>(part.first) * inner;
    const size_t stride = static_cast<size_t>(size) * inner, width = static_cast<size_t>(part.count) * inner;
    for (size_t i = 0; i < outer && width != 0; ++i) std::memcpy(to + i * width, data + i * stride, width);
  }
};

// To sizes of which 0 is that of the same axis of x, and one may be -1: what is left.
class ReshapeKernel : public StandardKernel {
 public:
  explicit ReshapeKernel(const Node& node) : StandardKernel("Reshape", node) {}

 private:
  void Compute(Call& call) const override {
    const AnyInput x = Any(call, 0);
    Any(call, 1);
    const Shape shape = Wanted(x.shape, Read<int64_t>(call, 1));
    void* to = call.Give(0, shape, x.type);
    const size_t bytes = CountOf(x.shape) * BytesOf(x.type);
    if (bytes != 0) std::memcpy(to, x.data, bytes);
  }

  Shape Wanted(const Shape& x, const Input<int64_t>& sizes) const {
    Problems problems = NoProblems();
    problems.ExpectRank("shape", sizes.shape, 1, "[rank]");
    problems.ThrowIfAny();
    Shape shape;
    size_t known = 1, open = Shape::kMost;
    for (size_t i = 0; i < std::min<size_t>(static_cast<size_t>(sizes.shape[0]), Shape::kMost); ++i) {
      shape.push_back(sizes.data[i] == 0 && i < x.size() ? x[i] : sizes.data[i]);
      if (shape[i] < -1 || (shape[i] == -1 && open != Shape::kMost))
        problems.Add("shape", "sizes of which one may be -1", ToText(shape));
      problems.ThrowIfAny();
      if (shape[i] < 0) {
        open = i;
      } else {
        known *= static_cast<size_t>(shape[i]);
      }
    }
    const size_t count = CountOf(x);
    if (open != Shape::kMost) shape[open] = known == 0 ? 0 : static_cast<int64_t>(count / known);
    if (static_cast<size_t>(sizes.shape[0]) > Shape::kMost || CountOf(shape) != count)
      problems.Add("shape", "sizes of " + std::to_string(count) + " elements", ToText(shape));
    problems.ThrowIfAny();
    return shape;
  }
};

// The sizes of x's axes, of those from `start` to `end`.
class ShapeKernel : public StandardKernel {
 public:
  explicit ShapeKernel(const Node& node)
      : StandardKernel("Shape", node),
        start_(node.Int("start", 0)),
        end_(node.Int("end", static_cast<int64_t>(Shape::kMost))) {}

 private:
  void Compute(Call& call) const override {
    const Shape shape = Any(call, 0).shape;
    const Part part = PartOf(start_, end_, static_cast<int64_t>(shape.size()));
    int64_t* sizes = Output<int64_t>(call, 0, {part.count});
    std::copy_n(shape.begin() + part.first, part.count, sizes);
  }

  int64_t start_, end_;
};

// Over the last axis.
class LayerNormKernel : public StandardKernel {
 public:
  explicit LayerNormKernel(const Node& node)
      : StandardKernel("LayerNormalization", node), epsilon_(node.Float(kEpsilon, kDefaultEpsilon)) {}

 private:
  void Compute(Call& call) const override {
    Any(call, 0);
    const Input<float> x = Read<float>(call, 0);
    Problems problems = NoProblems();
    if (x.shape.size() == 0) problems.Add("x", "of at least one axis", ToText(x.shape));
    problems.ThrowIfAny();
    const int64_t width = x.shape[x.shape.size() - 1];
    const Norm norm = inputs_.ReadNorm(call, 1, width, epsilon_, &problems);
    if (norm.scale == nullptr) problems.Add("norm_scale", "given", "nothing");
    problems.ThrowIfAny();
    const size_t rows = width == 0 ? 0 : CountOf(x.shape) / static_cast<size_t>(width);
    LayerNorm(x.data, norm, rows, static_cast<size_t>(width), Output<float>(call, 0, x.shape), call.Pool());
  }

  float epsilon_;
};

template <class Made>
std::unique_ptr<Kernel> Make(const Node& node) {
  return std::make_unique<Made>(node);
}

}  // namespace

KernelOf StandardKernelOf(const std::string& op) {
  if (op == "Concat") return ConcatKernelOf;
  if (op == "Gather") return Make<GatherKernel>;
  if (op == "LayerNormalization") return Make<LayerNormKernel>;
  if (op == "Reshape") return Make<ReshapeKernel>;
  if (op == "Shape") return Make<ShapeKernel>;
  if (op == "Slice") return Make<SliceKernel>;
  return ElementwiseKernelOf(op);
}

}  // namespace shadowc
