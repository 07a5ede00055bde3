// SPDX-License-Identifier: Apache-2.0
// What one call of a chain (ort_chain.cc) holds: values that its steps make, and from run to run what the
// host gave.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "arena.h"
#include "ort_op.h"

namespace shadowc {

inline constexpr size_t kNever = std::numeric_limits<size_t>::max();

// A value that a step makes.
struct Value {
  size_t last_reader;      // the step behind which its memory is free; that which makes it if nobody reads it
  size_t output = kNever;  // of the chain
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // that the graph says it has
  bool each = false;                                                         // those of all runs are put out
};

inline size_t MemoryOf(const Shape& shape, ONNXTensorElementDataType type) {
  size_t bytes = BytesOf(type);
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  return bytes;
}

// What all runs of one call share: the chain's inputs and outputs, for which the host is asked once.
class Runs {
 public:
  Runs(Call* host, size_t inputs, size_t outputs) : host_(*host), inputs_(inputs), outputs_(outputs) {}

  size_t run = 0, room = 1;

  AnyInput Find(size_t input) {
    if (inputs_[input].data == nullptr) inputs_[input] = host_.Find(input);
    return inputs_[input];
  }
  // From here on the input is a copy of this value.
  void Carry(size_t input, const AnyInput& value) {
    const size_t bytes = MemoryOf(value.shape, value.type);
    if (!(Find(input).shape == value.shape) || inputs_[input].type != value.type)
      throw Ort::Exception("Chain: input " + std::to_string(input) + " would change from run to run to " +
                               ToText(value.shape) + ", " + TypeName(value.type),
                           ORT_INVALID_ARGUMENT);
    void* to = run == 0 ? arena_.Take<std::byte>(bytes) : const_cast<void*>(inputs_[input].data);
    if (bytes != 0) std::memcpy(to, value.data, bytes);
    inputs_[input].data = to;
  }
  void* Give(const Value& value, const Shape& shape, ONNXTensorElementDataType type) {
    if (value.type != type)
      throw Ort::Exception(
          "Chain: output " + std::to_string(value.output) + " is of another type in the graph",
          ORT_INVALID_ARGUMENT);
    Given& given = outputs_[value.output];
    if (run == 0) {
      Shape all = shape;
      if (value.each && all.size() == 0)
        throw Ort::Exception("Chain: output " + std::to_string(value.output) + " has no axis for its runs",
                             ORT_INVALID_ARGUMENT);
      if (value.each) all[0] *= static_cast<int64_t>(room);
      given = {static_cast<std::byte*>(host_.Give(value.output, all, type)), shape};
    } else if (!(given.shape == shape)) {
      throw Ort::Exception("Chain: output " + std::to_string(value.output) + " changes its sizes to " +
                               ToText(shape) + " from run to run",
                           ORT_INVALID_ARGUMENT);
    }
    return given.data == nullptr || !value.each ? given.data : given.data + run * MemoryOf(shape, type);
  }

 private:
  struct Given {
    std::byte* data = nullptr;
    Shape shape;  // of one run
  };

  Call& host_;
  std::vector<AnyInput> inputs_;
  std::vector<Given> outputs_;
  CallArena arena_;
};

// What the steps of one run have made so far.
class Made {
 public:
  Made(Runs* runs, const std::vector<Value>& values, size_t before)
      : runs_(*runs), values_(values), before_(before), found_(values.size()), memory_(values.size()) {}

  AnyInput Find(int64_t value) {
    if (value < 0) return {};
    const size_t v = static_cast<size_t>(value);  // no weights: those are constants, which operators keep
    return v < before_ ? runs_.Find(v) : found_[v - before_];
  }

  void* Give(int64_t value, const Shape& shape, ONNXTensorElementDataType type) {
    if (value < 0) return nullptr;
    const size_t v = static_cast<size_t>(value) - before_;
    const Value& wanted = values_[v];
    void* data =
        wanted.output != kNever ? runs_.Give(wanted, shape, type) : TakeMemory(v, MemoryOf(shape, type));
    found_[v] = {data, type, shape};
    return data;
  }

  // Of these values, those that no step behind this one reads.
  void FreeBehind(size_t step, const std::vector<int64_t>& seen) {
    for (const int64_t value : seen) {
      if (value < static_cast<int64_t>(before_)) continue;
      const size_t v = static_cast<size_t>(value) - before_;
      if (values_[v].last_reader != step || memory_[v].data == nullptr) continue;
      free_.push_back(memory_[v]);
      memory_[v] = {};
    }
  }

 private:
  struct Memory {
    std::byte* data = nullptr;
    size_t bytes = 0;
  };
  static constexpr size_t kSmall = 256;  // bytes

  // What was used last and is large enough, so that layers share what is in the caches. Not much larger: what
  // layers count stays until it is joined, and each would hold what the next layer computes in.
  void* TakeMemory(size_t v, size_t bytes) {
    const auto fits = [=](const Memory& memory) {
      return memory.bytes >= bytes && memory.bytes <= std::max(2 * bytes, kSmall);
    };
    const auto found = std::find_if(free_.rbegin(), free_.rend(), fits);
    if (found != free_.rend()) {
      memory_[v] = *found;
      free_.erase(std::next(found).base());
    } else {
      memory_[v] = {arena_.Take<std::byte>(bytes), bytes};
    }
    return memory_[v].data;
  }

  Runs& runs_;
  const std::vector<Value>& values_;
  const size_t before_;  // so many are inputs or weights
  std::vector<AnyInput> found_;
  std::vector<Memory> memory_, free_;
  CallArena arena_;
};

}  // namespace shadowc
