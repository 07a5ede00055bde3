// SPDX-License-Identifier: Apache-2.0
// Calls enqueue of each plugin with made-up addresses and prints what arrives at the kernels, which are
// stand-ins here. Input i has address 1000 + i, output i 2000 + i, the workspace 3000, the stream 4000.
#include <cstdio>
#include <iterator>
#include <vector>

#include "log.h"
#include "plugin.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

long Number(const void* pointer) { return reinterpret_cast<long>(pointer); }
long Number(long value) { return value; }

void Print(const char* name, long value) { std::printf("%s=%ld ", name, value); }
#define SHOW(field) Print(#field, Number(a->field))

void Show(const shadowc_mask& mask) {
  const shadowc_mask* a = &mask;
  SHOW(scores), SHOW(threshold), Print("mask_batch", a->batch), SHOW(tail), SHOW(layers), SHOW(units),
      SHOW(layer);
}

void Show(const shadowc_select* a) {
  SHOW(batch), SHOW(tail), SHOW(layers), SHOW(units), SHOW(global), SHOW(min_active), SHOW(density_batch);
  SHOW(exempt_count), SHOW(scores), SHOW(density), SHOW(threshold), SHOW(active);
  for (int i = 0; i < a->exempt_count; ++i) Print("exempt", a->exempt[i]);
}

void Show(const shadowc_ffn* a) {
  SHOW(act), SHOW(weight), SHOW(batch), SHOW(tokens), SHOW(hidden), SHOW(neurons), SHOW(block),
      SHOW(skip_zeros);
  SHOW(x), SHOW(w1), SHOW(w2t), SHOW(scales), SHOW(b1), SHOW(b2), SHOW(y), SHOW(read);
  Show(a->mask);
}

void Show(const shadowc_attention* a) {
  SHOW(act), SHOW(weight), SHOW(batch), SHOW(tokens), SHOW(hidden), SHOW(heads), SHOW(head_size),
      SHOW(capacity);
  SHOW(kv_active), SHOW(x), SHOW(wq), SHOW(wk), SHOW(wv), SHOW(wot), SHOW(scales), SHOW(bqkv), SHOW(bo);
  SHOW(past_key), SHOW(past_value), SHOW(present_key), SHOW(present_value), SHOW(start), SHOW(past), SHOW(y);
  SHOW(context), SHOW(read);
  Show(a->mask);
}

int Enqueued(const char* op, void* workspace, cudaStream_t stream) {
  std::printf("op=%s ", op);
  Print("workspace", Number(workspace)), Print("stream", Number(stream));
  std::printf("\n");
  return SHADOWC_OK;
}

struct Tensor {
  DataType type;
  std::vector<int64_t> shape, largest;
};

nvinfer1::Dims ToDims(const std::vector<int64_t>& shape) {
  nvinfer1::Dims dims{};
  for (const int64_t size : shape) dims.d[dims.nbDims++] = size;
  return dims;
}

// Makes the plugin as TensorRT does, asks for its workspace, and enqueues it once from a context's copy.
void Probe(nvinfer1::IPluginCreatorInterface* creator, std::vector<PluginField> fields,
           std::vector<Tensor> inputs, int outputs) {
  const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  auto* made = static_cast<nvinfer1::IPluginCreatorV3One*>(creator)->createPlugin(
      "probe", &collection, nvinfer1::TensorRTPhase::kRUNTIME);
  auto* build = static_cast<nvinfer1::IPluginV3OneBuildV2*>(
      made->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
  auto* first = static_cast<nvinfer1::IPluginV3OneRuntime*>(
      made->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  std::vector<PluginTensorDesc> descriptions;
  std::vector<DynamicPluginTensorDesc> dynamic;
  std::vector<const void*> in;
  std::vector<void*> out;
  for (const Tensor& tensor : inputs) {
    descriptions.push_back({ToDims(tensor.shape), tensor.type, nvinfer1::TensorFormat::kLINEAR, 0});
    dynamic.push_back(
        {descriptions.back(), ToDims(tensor.shape), ToDims(tensor.largest), ToDims(tensor.shape)});
    in.push_back(reinterpret_cast<const void*>(1000 + in.size()));
  }
  for (int i = 0; i < outputs; ++i) {
    out.push_back(reinterpret_cast<void*>(2000l + i));
    std::printf("alias%d=%d ", i, build->getAliasedInput(i));
  }
  const int32_t count = static_cast<int32_t>(inputs.size());
  std::printf("asked=%zu ", build->getWorkspaceSize(dynamic.data(), count, nullptr, outputs));
  nvinfer1::IPluginV3* copy = first->attachToContext(nullptr);
  delete made;
  auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
      copy->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  std::printf("changed=%d ", runtime->onShapeChange(descriptions.data(), count, nullptr, outputs));
  if (runtime->enqueue(descriptions.data(), nullptr, in.data(), out.data(), reinterpret_cast<void*>(3000),
                       reinterpret_cast<cudaStream_t>(4000)) != 0) {
    std::printf("failed\n");
  }
  delete copy;
}

}  // namespace

// Distinct sizes per axis would be nicer than bytes: the sum tells that the largest of each was taken.
size_t shadowc_select_workspace(const shadowc_select* a) { return a->batch * 1000 + a->tail; }
size_t shadowc_ffn_workspace(const shadowc_ffn* a) {
  return a->batch * 1000000 + a->tokens * 1000 + a->mask.tail;
}
size_t shadowc_attention_workspace(const shadowc_attention* a) {
  return a->batch * 1000000000L + a->tokens * 1000000L + a->mask.tail * 10000L + a->capacity;
}
int shadowc_select_check(const shadowc_select*) { return SHADOWC_OK; }
int shadowc_ffn_check(const shadowc_ffn*) { return SHADOWC_OK; }
int shadowc_attention_check(const shadowc_attention*) { return SHADOWC_OK; }
int shadowc_select_enqueue(const shadowc_select* a, void* workspace, cudaStream_t stream) {
  return Show(a), Enqueued("SelectThreshold", workspace, stream);
}
int shadowc_ffn_enqueue(const shadowc_ffn* a, void* workspace, cudaStream_t stream) {
  return Show(a), Enqueued("SparseFFN", workspace, stream);
}
int shadowc_attention_enqueue(const shadowc_attention* a, void* workspace, cudaStream_t stream) {
  return Show(a), Enqueued("SparseAttention", workspace, stream);
}
const char* shadowc_error_text(int) { return "stand-in"; }

int main() {
  constexpr DataType f32 = DataType::kFLOAT, f16 = DataType::kHALF, bf16 = DataType::kBF16,
                     i8 = DataType::kINT8, i64 = DataType::kINT64;
  const int32_t exempt[] = {0, 4}, min_active = 3, layer = 2, block = 16, skip_zeros = 1;
  Probe(shadowc::trt::SelectThresholdCreator(),
        {{"scope", "global", PluginFieldType::kCHAR, 7},
         {"exempt", exempt, PluginFieldType::kINT32, 2},
         {"min_active", &min_active, PluginFieldType::kINT32, 1}},
        {{f32, {3, 2, 5, 12}, {16, 7, 5, 12}}, {f32, {1}, {16}}}, 2);
  Probe(shadowc::trt::SparseFfnCreator(),
        {{"layer", &layer, PluginFieldType::kINT32, 1},
         {"block", &block, PluginFieldType::kINT32, 1},
         {"skip_zeros", &skip_zeros, PluginFieldType::kINT32, 1}},
        {{bf16, {3, 4, 64}, {16, 32, 64}},
         {f32, {3, 2, 5, 7}, {16, 9, 5, 7}},
         {f32, {3, 2, 5}, {16, 9, 5}},
         {i8, {100, 64}, {100, 64}},
         {i8, {100, 64}, {100, 64}},
         {f32, {100, 2}, {100, 2}},
         {f32, {100}, {100}},
         {f32, {64}, {64}}},
        2);
  Probe(shadowc::trt::SparseAttentionCreator(),
        {{"layer", &layer, PluginFieldType::kINT32, 1}, {"kv", "active", PluginFieldType::kCHAR, 7}},
        {{f16, {3, 4, 64}, {16, 32, 64}},
         {f32, {1, 2, 5, 2}, {1, 9, 5, 2}},
         {f32, {1, 2, 5}, {1, 9, 5}},
         {f16, {64, 64}, {64, 64}},
         {f16, {64, 64}, {64, 64}},
         {f16, {64, 64}, {64, 64}},
         {f16, {64, 64}, {64, 64}},
         {f32, {2, 4, 32}, {2, 4, 32}},
         {f32, {2, 3, 32}, {2, 3, 32}},
         {f32, {64}, {64}},
         {f16, {3, 2, 40, 32}, {16, 2, 2048, 32}},
         {f16, {3, 2, 40, 32}, {16, 2, 2048, 32}},
         {i64, {3}, {16}},
         {i64, {3}, {16}}},
        5);
  return 0;
}
