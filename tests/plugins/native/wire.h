// SPDX-License-Identifier: Apache-2.0
// Calls and answers as bytes on a pipe.
//
// A call is "OPERATOR ATTRIBUTES TENSORS\n", one line "name value..." per attribute, then the tensors; an
// answer is "TENSORS\n" and the tensors. A tensor is "name type dimension...\n" and its bytes, type being
// numpy's name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <istream>
#include <map>
#include <ostream>
#include <string>
#include <vector>

struct Tensor {
  std::string type;
  std::vector<size_t> shape;
  std::vector<std::byte> bytes;  // exactly as many as the shape needs, so that a sanitizer sees its end

  template <class T>
  const T* As() const {
    return reinterpret_cast<const T*>(bytes.data());
  }
  template <class T>
  T* As() {
    return reinterpret_cast<T*>(bytes.data());
  }
};
using Tensors = std::map<std::string, Tensor>;

struct Call {
  std::string op;
  std::map<std::string, std::string> attributes;
  Tensors inputs;

  const Tensor& Input(const std::string& name) const;
  std::string Text(const std::string& name, const std::string& otherwise) const;
  int64_t Int(const std::string& name, int64_t otherwise) const;
  std::vector<int64_t> Ints(const std::string& name) const;
};

// Every bit set: NaN, or -1, wherever a kernel writes nothing.
Tensor Unwritten(const std::string& type, const std::vector<size_t>& shape);

// False at the end of the stream. Throws std::runtime_error if a call is cut off or makes no sense.
bool ReadCall(std::istream& stream, Call* call);
void WriteTensors(std::ostream& stream, const Tensors& tensors);
