// SPDX-License-Identifier: Apache-2.0
// ONNX's sums, differences, quotients, maxima, Relu and reductions as steps of a chain.
#include <algorithm>
#include <array>

#include "ort_standard.h"

namespace shadowc {
namespace {

// y = f(a, b), sizes of 1 as often as the other has them.
template <class F>
class BinaryKernel : public StandardKernel {
 public:
  using StandardKernel::StandardKernel;

 private:
  void Compute(Call& call) const override {
    const AnyInput a = Any(call, 0), b = Any(call, 1);
    Problems problems = NoProblems();
    if (a.type != b.type) problems.Add("b", std::string("as a, ") + TypeName(a.type), TypeName(b.type));
    problems.ThrowIfAny();
    if (a.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      Apply<float>(call, a, b);
    } else if (a.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
      Apply<int64_t>(call, a, b);
    } else {
      problems.Add("a", "float32 or int64", TypeName(a.type));
      problems.ThrowIfAny();
    }
  }

  Shape Joint(const Shape& a, const Shape& b) const {
    const size_t rank = std::max(a.size(), b.size());
    Shape joint;
    for (size_t i = 0; i < rank; ++i) {
      const int64_t of_a = SizeOf(a, i, rank), of_b = SizeOf(b, i, rank);
      if (of_a != of_b && of_a != 1 && of_b != 1) {
        Problems problems = NoProblems();
        problems.Add("b", "of sizes that go with a, " + ToText(a), ToText(b));
        problems.ThrowIfAny();
      }
      joint.push_back(of_a == 1 ? of_b : of_a);
    }
    return joint;
  }
  // Shapes end alike.
  static int64_t SizeOf(const Shape& shape, size_t axis, size_t rank) {
    return axis + shape.size() < rank ? 1 : shape[axis + shape.size() - rank];
  }
  // From one index of each of y's axes to the next, in elements.
  static std::array<size_t, Shape::kMost> Strides(const Shape& shape, size_t rank) {
    std::array<size_t, Shape::kMost> strides{};
    size_t stride = 1;
    for (size_t i = rank; i-- > 0;) {
      const int64_t size = SizeOf(shape, i, rank);
      strides[i] = size == 1 ? 0 : stride;
      stride *= static_cast<size_t>(size);
    }
    return strides;
  }

  template <class T>
  void Apply(Call& call, const AnyInput& given_a, const AnyInput& given_b) const {
    const Shape shape = Joint(given_a.shape, given_b.shape);
    const size_t count = CountOf(shape), rank = shape.size();
    const T *a = static_cast<const T*>(given_a.data), *b = static_cast<const T*>(given_b.data);
    T* y = Output<T>(call, 0, shape);
    if (given_a.shape == given_b.shape) {
      for (size_t i = 0; i < count; ++i) y[i] = F::Of(a[i], b[i]);
      return;
    }
    if (count == 0) return;
    // Along the last axis in one loop, all others as an odometer counts.
    const auto of_a = Strides(given_a.shape, rank), of_b = Strides(given_b.shape, rank);
    const size_t last = rank - 1, width = static_cast<size_t>(shape[last]);
    std::array<size_t, Shape::kMost> at{};
    for (size_t done = 0; done < count; done += width, y += width) {
      Along(a, of_a[last], b, of_b[last], width, y);
      for (size_t axis = last; axis-- > 0;) {
        a += of_a[axis];
        b += of_b[axis];
        if (++at[axis] < static_cast<size_t>(shape[axis])) break;
        a -= of_a[axis] * at[axis];
        b -= of_b[axis] * at[axis];
        at[axis] = 0;
      }
    }
  }

  template <class T>
  static void Along(const T* a, size_t of_a, const T* b, size_t of_b, size_t width, T* y) {
    if (of_a != 0 && of_b != 0) {
      for (size_t i = 0; i < width; ++i) y[i] = F::Of(a[i], b[i]);
    } else if (of_a != 0) {
      for (size_t i = 0; i < width; ++i) y[i] = F::Of(a[i], *b);
    } else {
      for (size_t i = 0; i < width; ++i) y[i] = F::Of(*a, b[i]);
    }
  }
};

struct Plus {
  static constexpr const char* kName = "Add";
  template <class T>
  static T Of(T a, T b) {
    return a + b;
  }
};
struct Minus {
  static constexpr const char* kName = "Sub";
  template <class T>
  static T Of(T a, T b) {
    return a - b;
  }
};
struct Divided {
  static constexpr const char* kName = "Div";
  static float Of(float a, float b) { return a / b; }
  static int64_t Of(int64_t a, int64_t b) { return b == 0 ? 0 : a / b; }  // ONNX leaves that open
};
// NaN if one of them is.
struct Larger {
  static constexpr const char *kName = "Max", *kReduce = "ReduceMax";
  template <class T>
  static T Of(T a, T b) {
    return a > b || a != a ? a : b;
  }
};
struct Smaller {
  static constexpr const char* kReduce = "ReduceMin";
  template <class T>
  static T Of(T a, T b) {
    return a < b || a != a ? a : b;
  }
};

class ReluKernel : public StandardKernel {
 public:
  explicit ReluKernel(const Node& node) : StandardKernel("Relu", node) {}

 private:
  void Compute(Call& call) const override {
    Any(call, 0);
    const Input<float> x = Read<float>(call, 0);
    float* y = Output<float>(call, 0, x.shape);
    const size_t count = CountOf(x.shape);
    for (size_t i = 0; i < count; ++i) y[i] = Larger::Of(x.data[i], 0.0f);
  }
};

// Over the last axis, which stays, of size 1.
template <class F>
class ReduceKernel : public StandardKernel {
 public:
  using StandardKernel::StandardKernel;

 private:
  void Compute(Call& call) const override {
    Any(call, 0);
    const Input<float> x = Read<float>(call, 0);
    const size_t axis = AxisOf(ReadOne(call, 1, "axes"), x.shape);
    const size_t width = static_cast<size_t>(x.shape[axis]);
    Problems problems = NoProblems();
    if (axis + 1 != x.shape.size()) problems.Add("axes", "the last one", std::to_string(axis));
    if (width == 0) problems.Add("the last axis of data", "at least 1", "0");
    problems.ThrowIfAny();
    Shape shape = x.shape;
    shape[axis] = 1;
    float* y = Output<float>(call, 0, shape);
    const size_t rows = CountOf(shape);
    for (size_t r = 0; r < rows; ++r) {
      const float* row = x.data + r * width;
      float found = row[0];
      for (size_t i = 1; i < width; ++i) found = F::Of(found, row[i]);
      y[r] = found;
    }
  }
};

template <class F>
std::unique_ptr<Kernel> MakeBinary(const Node& node) {
  return std::make_unique<BinaryKernel<F>>(F::kName, node);
}

template <class F>
std::unique_ptr<Kernel> MakeReduce(const Node& node) {
  return std::make_unique<ReduceKernel<F>>(F::kReduce, node);
}

std::unique_ptr<Kernel> MakeRelu(const Node& node) { return std::make_unique<ReluKernel>(node); }

}  // namespace

KernelOf ElementwiseKernelOf(const std::string& op) {
  if (op == "Add") return MakeBinary<Plus>;
  if (op == "Div") return MakeBinary<Divided>;
  if (op == "Max") return MakeBinary<Larger>;
  if (op == "ReduceMax") return MakeReduce<Larger>;
  if (op == "ReduceMin") return MakeReduce<Smaller>;
  if (op == "Relu") return MakeRelu;
  if (op == "Sub") return MakeBinary<Minus>;
  return nullptr;
}

}  // namespace shadowc
