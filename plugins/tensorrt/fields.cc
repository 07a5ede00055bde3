// SPDX-License-Identifier: Apache-2.0
#include "fields.h"

#include <cstring>
#include <iterator>

#include "log.h"

namespace shadowc::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const char* Name(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16:
      return "float16";
    case PluginFieldType::kFLOAT32:
      return "float32";
    case PluginFieldType::kFLOAT64:
      return "float64";
    case PluginFieldType::kINT8:
      return "int8";
    case PluginFieldType::kINT16:
      return "int16";
    case PluginFieldType::kINT32:
      return "int32";
    case PluginFieldType::kINT64:
      return "int64";
    case PluginFieldType::kCHAR:
      return "string";
    default:
      return "of another type";
  }
}

std::string Found(const PluginField& field) {
  return std::string(Name(field.type)) + " with " + std::to_string(field.length) + " value" +
         (field.length == 1 ? "" : "s");
}

std::string Wanted(const FieldSpec& spec) {
  switch (spec.kind) {
    case FieldSpec::Kind::kInt:
      return spec.highest == INT32_MAX
                 ? "one int of at least " + std::to_string(spec.lowest)
                 : "one int from " + std::to_string(spec.lowest) + " to " + std::to_string(spec.highest);
    case FieldSpec::Kind::kInts:
      return "1 to " + std::to_string(spec.most) + " ints of at least " + std::to_string(spec.lowest);
    default:
      return std::string("one of the strings ") + spec.choices[0] + ", " + spec.choices[1];
  }
}

// Reads field into value; returns what was found instead if it does not fit, else an empty string.
std::string Read(const FieldSpec& spec, const PluginField& field, FieldValue* value) {
  const size_t length = field.data == nullptr || field.length < 0 ? 0 : static_cast<size_t>(field.length);
  if (spec.kind == FieldSpec::Kind::kChoice) {
    if (field.type != PluginFieldType::kCHAR) return Found(field);
    const char* text = static_cast<const char*>(field.data);
    value->text.assign(
        text, length == 0 ? 0 : strnlen(text, length));  // the parser counts the final NUL, others do not
    for (int32_t i = 0; i < static_cast<int32_t>(std::size(spec.choices)); ++i) {
      if (value->text == spec.choices[i]) value->ints.assign(1, i);
    }
    return value->ints.empty() ? "'" + value->text + "'" : "";
  }
  const size_t most = spec.kind == FieldSpec::Kind::kInt ? 1 : static_cast<size_t>(spec.most);
  const bool wide = field.type == PluginFieldType::kINT64;
  if ((!wide && field.type != PluginFieldType::kINT32) || length < 1 || length > most) return Found(field);
  for (size_t i = 0; i < length; ++i) {
    const int64_t number =
        wide ? static_cast<const int64_t*>(field.data)[i] : static_cast<const int32_t*>(field.data)[i];
    if (number < spec.lowest || number > spec.highest) return std::to_string(number);
    value->ints.push_back(static_cast<int32_t>(number));
  }
  return "";
}

}  // namespace

bool ReadFields(const std::string& where, const std::vector<FieldSpec>& specs,
                const nvinfer1::PluginFieldCollection* given, std::vector<FieldValue>* values) {
  const int32_t count = given == nullptr || given->fields == nullptr ? 0 : given->nbFields;
  bool good = true;
  values->assign(specs.size(), {});
  for (size_t s = 0; s < specs.size(); ++s) {
    const PluginField* field = nullptr;
    for (int32_t i = 0; i < count; ++i) {
      if (std::strcmp(given->fields[i].name, specs[s].name) == 0) field = &given->fields[i];
    }
    const std::string found = field == nullptr ? "none" : Read(specs[s], *field, &(*values)[s]);
    if (found.empty()) continue;
    good = false;
    Error(where + ": attribute " + specs[s].name + ": expected " + Wanted(specs[s]) + ", found " + found);
  }
  for (int32_t i = 0; i < count; ++i) {
    bool known = false;
    for (const FieldSpec& spec : specs) known = known || std::strcmp(given->fields[i].name, spec.name) == 0;
    if (known) continue;
    good = false;
    std::string names;
    for (const FieldSpec& spec : specs) names += (names.empty() ? "" : ", ") + std::string(spec.name);
    Error(where + ": attribute " + given->fields[i].name + " is unknown: expected " + names);
  }
  return good;
}

std::vector<PluginField> ToFields(const std::vector<FieldSpec>& specs,
                                  const std::vector<FieldValue>& values) {
  std::vector<PluginField> fields;
  for (size_t s = 0; s < values.size(); ++s) {
    if (specs[s].kind == FieldSpec::Kind::kChoice) {
      fields.emplace_back(specs[s].name, values[s].text.c_str(), PluginFieldType::kCHAR,
                          static_cast<int32_t>(values[s].text.size() + 1));
    } else {
      fields.emplace_back(specs[s].name, values[s].ints.data(), PluginFieldType::kINT32,
                          static_cast<int32_t>(values[s].ints.size()));
    }
  }
  return fields;
}

std::string ToText(const std::vector<PluginField>& fields) {
  std::string text;
  for (const PluginField& field : fields) {
    text += (text.empty() ? "" : " ") + std::string(field.name) + "=";
    if (field.type == PluginFieldType::kCHAR) {
      text += static_cast<const char*>(field.data);
      continue;
    }
    for (int32_t i = 0; i < field.length; ++i)
      text += (i == 0 ? "" : ",") + std::to_string(static_cast<const int32_t*>(field.data)[i]);
  }
  return text;
}

}  // namespace shadowc::trt
