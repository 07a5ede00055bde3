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
//   times                number of the input, int64 [room, runs], that says how often all steps run; -1, the
//                        default: once
//   carried              pairs of an input and a value: from the second run on the input is what the run
//                        before has made
//   each                 of `results` those with the values of all runs, one behind the other along the
//                        first axis, which has room for `room` of them; of others what the last run made
//   until                a value and an input, of one number each: a run in which they are equal is the last
// Weights are no inputs of their own, for the host takes and gives back each of a node's in every call.
// shadowc/runtime/chains.py makes such nodes.
#include <algorithm>
#include <sstream>

#include "chain_runs.h"
#include "crew.h"
#include "ort_op.h"

namespace shadowc {
namespace {

constexpr const char* kName = "Chain";

std::vector<std::string> LinesOf(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

// What a step can be, beside ONNX's own.
struct Operator {
  const char* name;
  KernelOf kernel_of;
  size_t outputs;  // those that it always puts out
};
constexpr Operator kOperators[] = {
    {"MatMulRows", MatMulRowsKernelOf, 1},           {"NextToken", NextTokenKernelOf, 1},
    {"PredictUnits", PredictUnitsKernelOf, 3},       {"SelectThreshold", SelectThresholdKernelOf, 2},
    {"SparseAttention", SparseAttentionKernelOf, 3}, {"SparseFFN", SparseFfnKernelOf, 1},
};

struct Step {
  std::vector<int64_t> inputs, outputs;
  std::unique_ptr<Kernel> kernel;
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
      : stored_(StoredOf(node)),
        inputs_(node.InputCount()),
        results_(node.OutputTypes().size()),
        before_(inputs_ + stored_.size()) {
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
    ReadRuns(node);
  }

  void Compute(Call& call) const override {
    Runs runs(&call, inputs_, results_);
    const size_t most = MostRuns(&runs);
    Crew::Run(call.Pool(), [&](const Parallel& pool) {
      for (; runs.run < most; ++runs.run) {
        Made made(&runs, values_, before_);
        for (size_t i = 0; i < steps_.size(); ++i) {
          StepCall step(steps_[i], &made, pool);
          steps_[i].kernel->Compute(step);
          made.FreeBehind(i, steps_[i].inputs);
          made.FreeBehind(i, steps_[i].outputs);
        }
        if (runs.run + 1 == most || IsLast(&made)) return;
        for (const Pair& pair : carried_) runs.Carry(pair.input, made.Find(pair.value));
      }
    });
  }

 private:
  struct Pair {
    size_t input;
    int64_t value;
  };

  // How often, and what runs leave to the next.
  void ReadRuns(const Node& node) {
    times_ = node.Int("times", -1);
    if (times_ >= static_cast<int64_t>(inputs_)) Refuse(node, "how often it runs is no input");
    const std::vector<int64_t> carried = node.Ints("carried", {}), until = node.Ints("until", {});
    if (carried.size() % 2 != 0 || (!until.empty() && until.size() != 2))
      Refuse(node, "values and inputs go in pairs");
    const auto keep = [&](int64_t input, int64_t value) {
      if (input < 0 || input >= static_cast<int64_t>(inputs_)) Refuse(node, "a pair without an input");
      ValueOf(value, node).last_reader = steps_.size();
      return Pair{static_cast<size_t>(input), value};
    };
    for (size_t i = 0; i < carried.size(); i += 2) carried_.push_back(keep(carried[i], carried[i + 1]));
    if (!until.empty()) until_.push_back(keep(until[1], until[0]));
    for (const int64_t value : node.Ints("each", {})) {
      if (ValueOf(value, node).output == kNever) Refuse(node, "what each run puts out is no result");
      ValueOf(value, node).each = true;
    }
  }

  size_t MostRuns(Runs* runs) const {
    if (times_ < 0) return 1;
    const AnyInput times = runs->Find(static_cast<size_t>(times_));
    const int64_t* found = static_cast<const int64_t*>(times.data);
    if (times.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 || !(times.shape == Shape{2}) || found[1] < 1 ||
        found[1] > found[0])
      throw Ort::Exception("Chain: runs must be int64 [2], room for them and how many, at least 1",
                           ORT_INVALID_ARGUMENT);
    runs->room = static_cast<size_t>(found[0]);
    return static_cast<size_t>(found[1]);
  }

  bool IsLast(Made* made) const {
    for (const Pair& pair : until_) {
      const AnyInput value = made->Find(pair.value), end = made->Find(static_cast<int64_t>(pair.input));
      const auto is_number = [](const AnyInput& one) {
        return one.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 &&
               MemoryOf(one.shape, one.type) == sizeof(int64_t);
      };
      if (!is_number(value) || !is_number(end))
        throw Ort::Exception("Chain: what ends its runs must be one int64", ORT_INVALID_ARGUMENT);
      if (*static_cast<const int64_t*>(value.data) == *static_cast<const int64_t*>(end.data)) return true;
    }
    return false;
  }

  void AddStep(const Node& node, const std::string& op, const std::string& name) {
    const Operator known = OperatorOf(op);
    if (known.kernel_of == nullptr) Refuse(node, "no step can be '" + op + "'");
    const size_t number = steps_.size();
    const std::string prefix = std::to_string(number) + ".";
    Step step;
    step.inputs = node.Ints((prefix + "inputs").c_str(), {});
    step.outputs = node.Ints((prefix + "outputs").c_str(), {});
    for (const int64_t value : step.inputs) {
      if (value >= static_cast<int64_t>(before_)) ValueOf(value, node).last_reader = number;
    }
    const auto is_asked_for = [](int64_t value) { return value >= 0; };
    const size_t first = std::min(known.outputs, step.outputs.size());
    if (first < known.outputs ||
        !std::all_of(step.outputs.begin(), step.outputs.begin() + static_cast<ptrdiff_t>(first),
                     is_asked_for))
      Refuse(node, "step '" + name + "' lacks an output");
    for (const int64_t value : step.outputs) {
      if (!is_asked_for(value)) continue;
      if (value != static_cast<int64_t>(before_ + values_.size()))
        Refuse(node, "steps have to number what they make in order");
      values_.push_back({number});
    }
    step.kernel = known.kernel_of(node.Step(number, name, step.inputs, &stored_));
    steps_.push_back(std::move(step));
  }

  static Operator OperatorOf(const std::string& op) {
    for (const Operator& one : kOperators) {
      if (op == one.name) return one;
    }
    return {"", StandardKernelOf(op), 1};
  }

  Value& ValueOf(int64_t value, const Node& node) {
    const size_t v = static_cast<size_t>(value) - before_;
    if (value < static_cast<int64_t>(before_) || v >= values_.size())
      Refuse(node, "a value that no earlier step makes");
    return values_[v];
  }

  const std::vector<AnyInput> stored_;
  const size_t inputs_, results_;
  const size_t before_;  // inputs and weights, which are numbered before what steps make
  std::vector<Step> steps_;
  std::vector<Value> values_;
  int64_t times_ = -1;
  std::vector<Pair> carried_, until_;
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
