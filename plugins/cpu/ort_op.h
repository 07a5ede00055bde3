// SPDX-License-Identifier: Apache-2.0
// What the ONNX Runtime operators share: reading inputs, reporting every shape problem of a call in one
// sentence each, the host's thread pool, and turning C++ exceptions into statuses.
#pragma once

#ifndef ORT_API_MANUAL_INIT
#error "compile with ORT_API_MANUAL_INIT: the function table comes from the host, no symbol of it is linked"
#endif
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "parallel.h"
#include "types.h"

namespace shadowc {

using Shape = std::vector<int64_t>;

std::string ToText(const Shape& shape);

// Problems found in one call, with the operator and node they belong to.
class Problems {
 public:
  Problems(const char* op, const std::string& node) : where_(std::string(op) + " node '" + node + "'") {}

  void Add(const std::string& sentence) { found_.push_back(sentence); }
  // Records "NAME must be EXPECTED, found FOUND" unless ok.
  void Expect(bool ok, const std::string& name, const std::string& expected, const std::string& found);
  void ExpectShape(const char* name, const Shape& found, const Shape& expected, const char* letters);
  // Each ExpectRank or earlier problem makes later arithmetic on the shapes meaningless: stop there.
  void ExpectRank(const char* name, const Shape& found, size_t rank, const char* letters);
  void ThrowIfAny() const;

 private:
  std::string where_;
  std::vector<std::string> found_;
};

// One float or int64 tensor input.
template <class T>
struct Input {
  const T* data;
  Shape shape;
};

template <class T>
Input<T> ReadInput(const Ort::KernelContext& context, size_t index) {
  const Ort::ConstValue value = context.GetInput(index);
  return {value.GetTensorData<T>(), value.GetTensorTypeAndShapeInfo().GetShape()};
}

// The packed weights, of a type that is known only here.
struct Weights {
  WeightType type = WeightType::kFloat32;
  const void* data = nullptr;
  Shape shape;
};
Weights ReadWeights(const Ort::KernelContext& context, size_t index, Problems* problems);

// Checks w and scales against their rows ([F, 2] or [H, 4, D], which `letters` name) of `width` weights.
void ExpectWeights(const Weights& w, const Shape& scales, Shape rows, int64_t width,
                   const std::string& letters, Problems* problems);

// Reports an unsupported element type as soon as a session is made, if the type is known by then.
void CheckWeightType(const Ort::ConstKernelInfo& info, size_t index, Problems* problems);

// Checks scores [1 or B, S', L, N] and threshold [1 or B, S', L] against x [B, S, E].
Selection ReadSelection(const Ort::KernelContext& context, size_t scores_index, size_t threshold_index,
                        int64_t layer, int64_t batch, int64_t tokens, int64_t units, const char* units_text,
                        Problems* problems);

// An output, or null if the graph does not ask for it.
template <class T>
T* Output(const Ort::KernelContext& context, size_t index, const Shape& shape) {
  Ort::UnownedValue value = context.GetOutput(index, shape);
  return value ? value.GetTensorMutableData<T>() : nullptr;
}

// The optional norm of a sparse operator, norm_scale and norm_bias [E] from input `index` on. Both or
// neither.
Norm ReadNorm(const Ort::KernelContext& context, size_t index, int64_t width, float epsilon,
              Problems* problems);

void WriteRead(const Ort::KernelContext& context, size_t index, const ReadCount& read);

// The intra-op pool of the session that runs the kernel.
Parallel HostPool(OrtKernelContext* context);

float FloatAttribute(const Ort::ConstKernelInfo& info, const char* name, float otherwise);
int64_t IntAttribute(const Ort::ConstKernelInfo& info, const char* name, int64_t otherwise);
std::string TextAttribute(const Ort::ConstKernelInfo& info, const char* name, const char* otherwise);
std::vector<int64_t> IntsAttribute(const Ort::ConstKernelInfo& info, const char* name,
                                   const std::vector<int64_t>& otherwise);

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

// The parts of CustomOpBase that are the same for all of them. Kernel is constructed from the node's info and
// has Compute(OrtKernelContext*); both may throw.
template <class Op, class Kernel>
struct OpBase : Ort::CustomOpBase<Op, Kernel, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return AsStatus([&] { *kernel = new Kernel(Ort::ConstKernelInfo(info)); });
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index < Op::kRequiredInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return index < Op::kRequiredOutputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
};

// Attribute of both sparse operators, set by the runtime alone: calls with tokens that are not masked, which
// is what prompts are, may round activations and weights (panels.h). Constant scores that mask nothing have a
// tail of one token.
inline constexpr const char* kFewDigits = "few_digits";

// Of a norm that a sparse operator takes; the default of ONNX's LayerNormalization.
inline constexpr const char* kEpsilon = "epsilon";
inline constexpr float kDefaultEpsilon = 1e-5f;

// The operators, one per ort_*.cc; they live as long as the library.
const OrtCustomOp* PredictUnitsOp();
const OrtCustomOp* SelectThresholdOp();
const OrtCustomOp* SparseAttentionOp();         // cache of float32
const OrtCustomOp* SparseAttentionFloat16Op();  // the same operator, cache of float16
const OrtCustomOp* SparseFfnOp();

}  // namespace shadowc
