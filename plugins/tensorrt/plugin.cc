// SPDX-License-Identifier: Apache-2.0
#include "plugin.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "log.h"

namespace shadowc::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr const char* kNamespace = "shadowc";
// To be raised when fields, operands or the layout of weights change; plans name it.
constexpr const char* kVersion = "1";

Extents ToExtents(const nvinfer1::Dims& dims) { return Extents(dims.d, dims.d + std::max(dims.nbDims, 0)); }

Extents ToExtents(const DimsExprs& dims) {
  Extents extents;
  for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
    extents.push_back(dims.d[axis]->isConstant() ? dims.d[axis]->getConstantValue() : kUnknown);
  }
  return extents;
}

// The size behind `letter` in an output: the axis of the first input that has it.
const nvinfer1::IDimensionExpr* Find(const Signature& signature, const DimsExprs* inputs, char letter) {
  for (size_t i = 0; i < signature.inputs.size(); ++i) {
    const char* axis = std::strchr(signature.inputs[i].shape, letter);
    if (axis != nullptr) return inputs[i].d[axis - signature.inputs[i].shape];
  }
  return nullptr;
}

}  // namespace

Plugin::Plugin(const OpSpec& spec, std::string node, Values values)
    : node_(std::move(node)),
      spec_(spec),
      values_(std::move(values)),
      where_(std::string(spec.signature.op) + " '" + node_ + "'"),
      fields_(ToFields(spec.fields, values_)),
      metadata_(ToText(fields_)) {
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  try {
    return Copy().release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

const char* Plugin::getPluginVersion() const noexcept { return kVersion; }
const char* Plugin::getPluginNamespace() const noexcept { return kNamespace; }

int32_t Plugin::getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                                   int32_t input_count) const noexcept {
  const Signature& signature = spec_.signature;
  if (static_cast<size_t>(input_count) != signature.inputs.size() || output_count != getNbOutputs()) {
    Error(where_ + ": expected " + std::to_string(signature.inputs.size()) + " inputs and " +
          std::to_string(getNbOutputs()) + " outputs, found " + std::to_string(input_count) + " and " +
          std::to_string(output_count));
    return 1;
  }
  bool good = true;
  for (int position = 0; position < input_count; ++position) {
    good = TypeFits(&where_, signature, inputs, position) && good;
  }
  if (!good) return 1;
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    switch (signature.outputs[i].type) {
      case Operand::Type::kFloat:
        outputs[i] = DataType::kFLOAT;
        break;
      case Operand::Type::kInt32:
        outputs[i] = DataType::kINT32;
        break;
      case Operand::Type::kInt64:
        outputs[i] = DataType::kINT64;
        break;
      default:
        outputs[i] = inputs[FirstOf(signature, signature.outputs[i].type)];
    }
  }
  return 0;
}

int32_t Plugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                                DimsExprs* outputs, int32_t output_count,
                                nvinfer1::IExprBuilder& builder) noexcept {
  std::vector<Extents> shapes;
  for (int32_t i = 0; i < input_count; ++i) shapes.push_back(ToExtents(inputs[i]));
  if (!CheckShapes(shapes) || output_count != getNbOutputs()) return 1;
  const Signature& signature = spec_.signature;
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    const char* shape = signature.outputs[i].shape;
    outputs[i].nbDims = static_cast<int32_t>(std::strlen(shape));
    for (int32_t axis = 0; axis < outputs[i].nbDims; ++axis) {
      const bool digit = shape[axis] >= '0' && shape[axis] <= '9';
      outputs[i].d[axis] = digit ? builder.constant(shape[axis] - '0') : Find(signature, inputs, shape[axis]);
    }
  }
  return 0;
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                       int32_t) noexcept {
  // The builder also tries vectorised layouts; refusing those is no error.
  if (tensors[position].desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
  std::vector<DataType> types;
  for (int32_t i = 0; i <= position; ++i) types.push_back(tensors[i].desc.type);
  return TypeFits(&where_, spec_.signature, types.data(), position);
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                const DynamicPluginTensorDesc*, int32_t) noexcept {
  std::vector<Extents> shapes;
  for (int32_t i = 0; i < input_count; ++i) shapes.push_back(ToExtents(inputs[i].desc.dims));
  if (!CheckShapes(shapes)) return 1;
  const Call call = Largest(inputs, input_count);
  const int status = Status(call);
  if (status == SHADOWC_OK) return 0;
  Error(where_ + ": at the largest shapes of the profile (" + ToText(call.sizes) +
        "): " + shadowc_error_text(status));
  return 1;
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return Workspace(Largest(inputs, input_count));
}

Plugin::Call Plugin::Largest(const DynamicPluginTensorDesc* inputs, int32_t input_count) const {
  const Signature& signature = spec_.signature;
  Call call;
  for (int32_t i = 0; i < input_count; ++i) {
    const char* shape = signature.inputs[static_cast<size_t>(i)].shape;
    for (int32_t axis = 0; axis < inputs[i].max.nbDims; ++axis) {
      const bool digit = shape[axis] >= '0' && shape[axis] <= '9';
      if (!digit)
        call.sizes.Set(shape[axis], std::max<int64_t>(call.sizes[shape[axis]], inputs[i].max.d[axis]));
    }
  }
  call.activation = KernelType(inputs[FirstOf(signature, Operand::Type::kActivation)].desc.type);
  call.weight = KernelType(inputs[FirstOf(signature, Operand::Type::kWeight)].desc.type);
  return call;
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
  return spec_.signature.outputs[static_cast<size_t>(output)].aliases;
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                              int32_t) noexcept {
  std::vector<Extents> shapes;
  for (int32_t i = 0; i < input_count; ++i) shapes.push_back(ToExtents(inputs[i].dims));
  return CheckShapes(shapes) ? 0 : 1;
}

int32_t Plugin::enqueue(const PluginTensorDesc* inputs_desc, const PluginTensorDesc*,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  const Signature& signature = spec_.signature;
  Call call;
  call.sizes = ReadSizes(signature, inputs_desc);
  call.activation = KernelType(inputs_desc[FirstOf(signature, Operand::Type::kActivation)].type);
  call.weight = KernelType(inputs_desc[FirstOf(signature, Operand::Type::kWeight)].type);
  call.inputs = inputs;
  call.outputs = outputs;
  call.workspace = workspace;
  call.stream = stream;
  const int status = Enqueue(call);
  if (status != SHADOWC_OK) Error(where_ + ": " + shadowc_error_text(status));
  return status;
}

bool Plugin::Expect(bool ok, const std::string& name, const std::string& expected,
                    const std::string& found) const {
  if (!ok) Error(where_ + ": " + name + ": expected " + expected + ", found " + found);
  return ok;
}

bool Plugin::ExpectMask(const Sizes& sizes, int layer, int64_t units, const std::string& text) const {
  const auto known = [&](char letter) { return sizes[letter] != kUnknown; };
  bool good = true;
  if (known('M') && known('B')) {
    good &= Expect(sizes['M'] == 1 || sizes['M'] == sizes['B'], "batch of scores (M)",
                   "1 or B = " + std::to_string(sizes['B']), std::to_string(sizes['M']));
  }
  if (known('Z') && known('S')) {
    good &= Expect(sizes['Z'] <= sizes['S'], "sparse tail (Z)", "at most S = " + std::to_string(sizes['S']),
                   std::to_string(sizes['Z']));
  }
  if (known('L')) {
    good &= Expect(layer < sizes['L'], "attribute layer", "less than L = " + std::to_string(sizes['L']),
                   std::to_string(layer));
  }
  if (known('N') && units != kUnknown) {
    good &= Expect(sizes['N'] == units, "units of scores (N)", text + " = " + std::to_string(units),
                   std::to_string(sizes['N']));
  }
  return good;
}

bool Plugin::CheckShapes(const std::vector<Extents>& shapes) const {
  Sizes sizes;
  return BindShapes(where_, spec_.signature, shapes, &sizes) && Check(sizes);
}

Creator::Creator(const OpSpec& spec, Make make) : spec_(spec), make_(make) {
  for (const FieldSpec& field : spec.fields) {
    const bool text = field.kind == FieldSpec::Kind::kChoice;
    fields_.emplace_back(field.name, nullptr,
                         text ? nvinfer1::PluginFieldType::kCHAR : nvinfer1::PluginFieldType::kINT32,
                         field.most);
  }
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* given,
                                           nvinfer1::TensorRTPhase) noexcept {
  try {
    const std::string node = name == nullptr ? "" : name;
    Values values;
    if (!ReadFields(std::string(spec_.signature.op) + " '" + node + "'", spec_.fields, given, &values))
      return nullptr;
    return make_(node, std::move(values)).release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

const char* Creator::getPluginVersion() const noexcept { return kVersion; }
const char* Creator::getPluginNamespace() const noexcept { return kNamespace; }

nvinfer1::IPluginCreatorInterface* const* Creators() {
  static nvinfer1::IPluginCreatorInterface* const all[kCreators] = {
      SelectThresholdCreator(), SparseFfnCreator(), SparseAttentionCreator()};
  return all;
}

}  // namespace shadowc::trt
