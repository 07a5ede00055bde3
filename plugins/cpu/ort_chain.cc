// SPDX-License-Identifier: Apache-2.0
// Chain as an ONNX Runtime operator: several of the others, one behind the other, and what joins their
// results, as one node. From node to node the host takes some 10 us, as behind megabytes of weights nothing
// that it needs is in the caches; and its threads, which it has to call for every parallel section, stay for
// all of them here (crew.h).
//
// Inputs are those of all steps, but for weights that are stored, outputs what is wanted of theirs.
// Attributes:
//   operators, names     of the steps, one per line
//   stored               number of the input, constant bytes, in which weights lie; -1, the default: none do
//   stored.N             weights number N: element type (as in ONNX), first byte, sizes of the axes
//   I.inputs, I.outputs  values of step I: first the chain's inputs are numbered, then the weights, then what
//                        steps make; -1 for what is not given or not asked for
//   I.NAME               attribute NAME of step I's operator
//   results              the values that the chain puts out; the graph has to say their types
// Weights are no inputs of their own, for the host takes and gives back each of a node's in every call.
// shadowc/runtime/chains.py makes such nodes.
#include <algorithm>
#include <iterator>
#include <limits>
#include <sstream>

#include "arena.h"
#include "crew.h"
#include "ort_op.h"

namespace shadowc {
namespace {

constexpr const char* kName = "Chain";
constexpr size_t kNever = std::numeric_limits<size_t>::max();

std::vector<std::string> LinesOf(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

// What a step can be.
struct Operator {
  const char* name;
  std::unique_ptr<Kernel> (*kernel_of)(const Node& node);
  size_t outputs;  // those that it always puts out
};
constexpr Operator kOperators[] = {
    {"Concat", ConcatKernelOf, 1},
    {"MatMulRows", MatMulRowsKernelOf, 1},
    {"PredictUnits", PredictUnitsKernelOf, 3},
    {"SelectThreshold", SelectThresholdKernelOf, 2},
    {"SparseAttention", SparseAttentionKernelOf, 3},
    {"SparseFFN", SparseFfnKernelOf, 1},
};

struct Step {
  std::vector<int64_t> inputs, outputs;
  std::unique_ptr<Kernel> kernel;
};

// A value that a step makes.
struct Value {
  size_t last_reader;      // the step behind which its memory is free; that which makes it if nobody reads it
  size_t output = kNever;  // of the chain
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // that the graph says it has
};

// What the steps of one call have made so far.
class Made {
 public:
  Made(Call* host, const std::vector<Value>& values, size_t before)
      : host_(*host), values_(values), before_(before), found_(values.size()), memory_(values.size()) {}

  AnyInput Find(int64_t value) {
    if (value < 0) return {};
    const size_t v = static_cast<size_t>(value);  // no weights: those are constants, which operators keep
    return v < before_ ? host_.Find(v) : found_[v - before_];
  }

  void* Give(int64_t value, const Shape& shape, ONNXTensorElementDataType type) {
    if (value < 0) return nullptr;
    const size_t v = static_cast<size_t>(value) - before_;
    const Value& wanted = values_[v];
    if (wanted.output != kNever && wanted.type != type)
      throw Ort::Exception(
          "Chain: output " + std::to_string(wanted.output) + " is of another type in the graph",
          ORT_INVALID_ARGUMENT);
    void* data = wanted.output != kNever ? host_.Give(wanted.output, shape, type)
                                         : TakeMemory(v, MemoryOf(shape, type));
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

  static size_t MemoryOf(const Shape& shape, ONNXTensorElementDataType type) {
    size_t bytes = BytesOf(type);
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    return bytes;
  }

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

  Call& host_;
  const std::vector<Value>& values_;
  const size_t before_;  // so many are inputs or weights
  std::vector<AnyInput> found_;
  std::vector<Memory> memory_, free_;
  CallArena arena_;
};

class StepCall : public Call {
 public:
  StepCall(const Step& step, Made* made, const Parallel& pool) : step_(step), made_(*made), pool_(pool) {}

  AnyInput Find(size_t index) override { return made_.Find(step_.inputs[index]); }
  void* Give(size_t index, const Shape& shape, ONNXTensorElementDataType type) override {
    return index < step_.outputs.size() ? made_.Give(step_.outputs[index], shape, type) : nullptr;
  }
  Parallel Pool() override { return pool_; }

 private:
  const Step& step_;
  Made& made_;
  const Parallel& pool_;
};

[[noreturn]] void Refuse(const Node& node, const std::string& why) {
  throw Ort::Exception("Chain node '" + node.Name() + "': " + why, ORT_INVALID_ARGUMENT);
}

// The weights that lie in one constant of the graph.
std::vector<AnyInput> StoredOf(const Node& node) {
  const int64_t number = node.Int("stored", -1);
  std::vector<AnyInput> stored;
  if (number < 0) return stored;
  const AnyInput all = node.Constant(static_cast<size_t>(number));
  if (all.data == nullptr || all.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 || all.shape.size() != 1)
    Refuse(node, "weights have to lie in a constant of uint8 [bytes]");
  const auto next = [&] { return node.Ints(("stored." + std::to_string(stored.size())).c_str(), {}); };
  for (std::vector<int64_t> place = next(); !place.empty(); place = next()) {
    if (place.size() < 2 || place.size() > 2 + Shape::kMost || place[1] < 0)
      Refuse(node, "weights have a type, a first byte and at most " + std::to_string(Shape::kMost) + " axes");
    AnyInput weights{nullptr, static_cast<ONNXTensorElementDataType>(place[0]), {}};
    const uint64_t room = static_cast<uint64_t>(all.shape[0]), first = static_cast<uint64_t>(place[1]);
    uint64_t bytes = BytesOf(weights.type);
    bool fits = first <= room && first % bytes == 0;
    for (size_t i = 2; i < place.size(); ++i) {
      weights.shape.push_back(place[i]);
      fits = fits && place[i] >= 0 && !__builtin_mul_overflow(bytes, static_cast<uint64_t>(place[i]), &bytes);
    }
    if (!fits || bytes > room - first)
      Refuse(node, "weights number " + std::to_string(stored.size()) + " do not lie in its constant");
    weights.data = static_cast<const std::byte*>(all.data) + first;
    stored.push_back(weights);
  }
  return stored;
}

class ChainKernel : public Kernel {
 public:
  explicit ChainKernel(const Node& node)
      : stored_(StoredOf(node)), before_(node.InputCount() + stored_.size()) {
    const std::vector<std::string> operators = LinesOf(node.Text("operators", ""));
    const std::vector<std::string> names = LinesOf(node.Text("names", ""));
    if (operators.size() != names.size() || operators.empty())
      Refuse(node, "every step has an operator and a name");
    for (size_t i = 0; i < operators.size(); ++i) AddStep(node, operators[i], names[i]);
    const std::vector<int64_t> results = node.Ints("results", {});
    const std::vector<ONNXTensorElementDataType> types = node.OutputTypes();
    if (results.size() != types.size()) Refuse(node, "results have to be as many as outputs");
    for (size_t i = 0; i < results.size(); ++i) {
      Value& value = ValueOf(results[i], node);
      if (value.output != kNever) Refuse(node, "a result is there twice");
      value.output = i;
      value.type = types[i];
    }
  }

  void Compute(Call& call) const override {
    Crew::Run(call.Pool(), [&](const Parallel& pool) {
      Made made(&call, values_, before_);
      for (size_t i = 0; i < steps_.size(); ++i) {
        StepCall step(steps_[i], &made, pool);
        steps_[i].kernel->Compute(step);
        made.FreeBehind(i, steps_[i].inputs);
        made.FreeBehind(i, steps_[i].outputs);
      }
    });
  }

 private:
  void AddStep(const Node& node, const std::string& op, const std::string& name) {
    const auto* known = std::find_if(std::begin(kOperators), std::end(kOperators),
                                     [&](const Operator& one) { return op == one.name; });
    if (known == std::end(kOperators)) Refuse(node, "no step can be '" + op + "'");
    const size_t number = steps_.size();
    const std::string prefix = std::to_string(number) + ".";
    Step step;
    step.inputs = node.Ints((prefix + "inputs").c_str(), {});
    step.outputs = node.Ints((prefix + "outputs").c_str(), {});
    for (const int64_t value : step.inputs) {
      if (value >= static_cast<int64_t>(before_)) ValueOf(value, node).last_reader = number;
    }
    const auto is_asked_for = [](int64_t value) { return value >= 0; };
    const size_t first = std::min(known->outputs, step.outputs.size());
    if (first < known->outputs ||
        !std::all_of(step.outputs.begin(), step.outputs.begin() + static_cast<ptrdiff_t>(first),
                     is_asked_for))
      Refuse(node, "step '" + name + "' lacks an output");
    for (const int64_t value : step.outputs) {
      if (!is_asked_for(value)) continue;
      if (value != static_cast<int64_t>(before_ + values_.size()))
        Refuse(node, "steps have to number what they make in order");
      values_.push_back({number});
    }
    step.kernel = known->kernel_of(node.Step(number, name, step.inputs, &stored_));
    steps_.push_back(std::move(step));
  }

  Value& ValueOf(int64_t value, const Node& node) {
    const size_t v = static_cast<size_t>(value) - before_;
    if (value < static_cast<int64_t>(before_) || v >= values_.size())
      Refuse(node, "a value that no earlier step makes");
    return values_[v];
  }

  const std::vector<AnyInput> stored_;
  const size_t before_;  // inputs and weights, which are numbered before what steps make
  std::vector<Step> steps_;
  std::vector<Value> values_;
};

struct ChainOpType : Ort::CustomOpBase<ChainOpType, ChainKernel, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return MakeKernel<ChainKernel>(info, kernel);
  }
  const char* GetName() const { return kName; }
  size_t GetInputTypeCount() const { return 1; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
  bool GetVariadicInputHomogeneity() const { return false; }
  bool GetVariadicOutputHomogeneity() const { return false; }
};

}  // namespace

const OrtCustomOp* ChainOp() {
  static const ChainOpType op;
  return &op;
}

}  // namespace shadowc
