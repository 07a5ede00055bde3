// SPDX-License-Identifier: Apache-2.0
// The attributes of a node as TensorRT hands them over: fields with a name, a type and a length, none of them
// checked.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace shadowc::trt {

// What a field has to look like. TensorRT's parser passes on the fields that are named here and drops the
// others without a word, so a misspelled attribute shows as a missing one: none has a default.
struct FieldSpec {
  enum class Kind : uint8_t { kInt, kInts, kChoice } kind;
  const char* name;
  int32_t lowest = 0, highest = 0;  // kInt, and each of kInts
  int32_t most = 1;                 // kInts: number of values
  const char* choices[2] = {};      // kChoice
};

// One field read. kChoice: the index of the choice in ints[0], the word in text.
struct FieldValue {
  std::vector<int32_t> ints;
  std::string text;
};

// Reads all fields of `specs` in their order. Reports each field that is missing, unknown, of another type or
// length or out of range, and returns false, if there is one. `where` begins each sentence.
bool ReadFields(const std::string& where, const std::vector<FieldSpec>& specs,
                const nvinfer1::PluginFieldCollection* given, std::vector<FieldValue>* values);

// The fields to serialise; they point into `values`.
std::vector<nvinfer1::PluginField> ToFields(const std::vector<FieldSpec>& specs,
                                            const std::vector<FieldValue>& values);

// "layer=3 block=16 skip_zeros=0": what fields for serialising hold, for those who cannot read a plan.
std::string ToText(const std::vector<nvinfer1::PluginField>& fields);

}  // namespace shadowc::trt
