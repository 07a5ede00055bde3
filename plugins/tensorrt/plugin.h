// SPDX-License-Identifier: Apache-2.0
// What the three operators share as TensorRT plugins: everything that follows from the signature and the
// fields. An operator adds its own checks, its workspace, and the call of its kernels.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fields.h"
#include "operands.h"

namespace shadowc::trt {

struct OpSpec {
  Signature signature;
  std::vector<FieldSpec> fields;
};

using Values = std::vector<FieldValue>;

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const OpSpec& spec, std::string node, Values values);
  Plugin(const Plugin&) = delete;
  Plugin& operator=(const Plugin&) = delete;
  ~Plugin() override = default;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return spec_.signature.op; }
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  int32_t getNbOutputs() const noexcept override {
    return static_cast<int32_t>(spec_.signature.outputs.size());
  }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) const noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;
  // The fields that will be serialised: compile compares them with the graph.
  const char* getMetadataString() noexcept override { return metadata_.c_str(); }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs_desc,
                  const nvinfer1::PluginTensorDesc* outputs_desc, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 protected:
  // One call of the kernels. The pointers are null while only sizes matter.
  struct Call {
    Sizes sizes;
    shadowc_dtype activation = SHADOWC_F32, weight = SHADOWC_F32;
    const void* const* inputs = nullptr;
    void* const* outputs = nullptr;
    void* workspace = nullptr;
    cudaStream_t stream = nullptr;

    template <class T>
    const T* In(int index) const {
      return inputs == nullptr ? nullptr : static_cast<const T*>(inputs[index]);
    }
    template <class T>
    T* Out(int index) const {
      return outputs == nullptr ? nullptr : static_cast<T*>(outputs[index]);
    }
    // The mask in the inputs `scores` and `threshold`.
    shadowc_mask Mask(int scores, int threshold, int layer) const {
      return {In<float>(scores), In<float>(threshold), sizes.Int('M'), sizes.Int('Z'),
              sizes.Int('L'),    sizes.Int('N'),       layer};
    }
  };

  const Values& values() const { return values_; }
  int32_t IntField(size_t index) const { return values_[index].ints[0]; }

  // Reports "node: NAME: expected EXPECTED, found FOUND" unless ok, and returns ok.
  bool Expect(bool ok, const std::string& name, const std::string& expected, const std::string& found) const;
  // The checks of scores and threshold that both sparse operators need; `units` is the size of N, `text` its
  // rule.
  bool ExpectMask(const Sizes& sizes, int layer, int64_t units, const std::string& text) const;

  virtual std::unique_ptr<Plugin> Copy() const = 0;
  // Checks beyond the signature; unknown sizes pass.
  virtual bool Check(const Sizes& sizes) const = 0;
  // What the kernels say to sizes and types alone: SHADOWC_OK, or a code for shadowc_error_text.
  virtual int Status(const Call& call) const = 0;
  virtual size_t Workspace(const Call& call) const = 0;
  // Launches on call.stream and returns what the kernels' function returned.
  virtual int Enqueue(const Call& call) const = 0;

  const std::string node_;

 private:
  bool CheckShapes(const std::vector<Extents>& shapes) const;
  // Each size at its largest in the profile, from whatever input has it; no pointers.
  Call Largest(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count) const;

  const OpSpec& spec_;
  const Values values_;
  const std::string where_;
  std::vector<nvinfer1::PluginField> fields_;
  const std::string metadata_;
  nvinfer1::PluginFieldCollection collection_{};
};

class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  using Make = std::unique_ptr<Plugin> (*)(std::string node, Values values);

  Creator(const OpSpec& spec, Make make);
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return spec_.signature.op; }
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  const OpSpec& spec_;
  Make make_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// One per operator; they live as long as the library.
nvinfer1::IPluginCreatorInterface* SelectThresholdCreator();
nvinfer1::IPluginCreatorInterface* SparseFfnCreator();
nvinfer1::IPluginCreatorInterface* SparseAttentionCreator();

// All of them. They outlive every TensorRT object.
inline constexpr int32_t kCreators = 3;
nvinfer1::IPluginCreatorInterface* const* Creators();

}  // namespace shadowc::trt
