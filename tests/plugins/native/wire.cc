// SPDX-License-Identifier: Apache-2.0
#include "wire.h"

#include <cstring>
#include <sstream>
#include <stdexcept>

namespace {

size_t BytesOf(const std::string& type) {
  static const std::map<std::string, size_t> sizes = {
      {"int8", 1}, {"uint8", 1}, {"float16", 2}, {"bfloat16", 2}, {"int32", 4}, {"float32", 4}, {"int64", 8}};
  const auto found = sizes.find(type);
  if (found == sizes.end()) throw std::runtime_error("no such element type: '" + type + "'");
  return found->second;
}

size_t BytesOf(const std::string& type, const std::vector<size_t>& shape) {
  size_t bytes = BytesOf(type);
  for (const size_t size : shape) bytes *= size;
  return bytes;
}

std::istringstream Line(std::istream& stream) {
  std::string line;
  if (!std::getline(stream, line)) throw std::runtime_error("the call is cut off");
  return std::istringstream(line);
}

template <class T>
std::vector<T> Rest(std::istream& line) {
  std::vector<T> values;
  for (T value; line >> value;) values.push_back(value);
  return values;
}

}  // namespace

const Tensor& Call::Input(const std::string& name) const {
  const auto found = inputs.find(name);
  if (found == inputs.end()) throw std::runtime_error(op + ": no input '" + name + "'");
  return found->second;
}

std::string Call::Text(const std::string& name, const std::string& otherwise) const {
  const auto found = attributes.find(name);
  return found == attributes.end() ? otherwise : found->second;
}

int64_t Call::Int(const std::string& name, int64_t otherwise) const {
  return std::stoll(Text(name, std::to_string(otherwise)));
}

std::vector<int64_t> Call::Ints(const std::string& name) const {
  std::istringstream values(Text(name, ""));
  return Rest<int64_t>(values);
}

Tensor Unwritten(const std::string& type, const std::vector<size_t>& shape) {
  return {type, shape, std::vector<std::byte>(BytesOf(type, shape), std::byte{0xff})};
}

bool ReadCall(std::istream& stream, Call* call) {
  *call = {};
  if (stream.peek() == std::istream::traits_type::eof()) return false;
  size_t attributes = 0, tensors = 0;
  if (!(Line(stream) >> call->op >> attributes >> tensors)) throw std::runtime_error("no call");
  for (size_t i = 0; i < attributes; ++i) {
    std::istringstream line = Line(stream);
    std::string name;
    line >> name >> std::ws;
    std::getline(line, call->attributes[name]);
  }
  for (size_t i = 0; i < tensors; ++i) {
    std::istringstream line = Line(stream);
    std::string name, type;
    line >> name >> type;
    Tensor& tensor = call->inputs[name] = Unwritten(type, Rest<size_t>(line));
    if (!stream.read(reinterpret_cast<char*>(tensor.bytes.data()),
                     static_cast<std::streamsize>(tensor.bytes.size()))) {
      throw std::runtime_error("input '" + name + "' is cut off");
    }
  }
  return true;
}

void WriteTensors(std::ostream& stream, const Tensors& tensors) {
  stream << tensors.size() << '\n';
  for (const auto& [name, tensor] : tensors) {
    stream << name << ' ' << tensor.type;
    for (const size_t size : tensor.shape) stream << ' ' << size;
    stream << '\n';
    stream.write(reinterpret_cast<const char*>(tensor.bytes.data()),
                 static_cast<std::streamsize>(tensor.bytes.size()));
  }
  stream.flush();
}
