// SPDX-License-Identifier: Apache-2.0
// SparseFFN as a TensorRT plugin.
#include "plugin.h"

namespace shadowc::trt {
namespace {

enum In : int { kX, kScores, kThreshold, kW1, kW2t, kScales, kB1, kB2 };
enum Out : int { kY, kRead };
enum Field : size_t { kLayer, kBlock, kSkipZeros };

// Never destroyed, like the creator: TensorRT may look at both while the process ends.
const OpSpec& Spec() {
  using Type = Operand::Type;
  using Kind = FieldSpec::Kind;
  static const auto* spec = new OpSpec{{"SparseFFN",
                                        {{Type::kActivation, "x", "BSE"},
                                         {Type::kFloat, "scores", "MZLN"},
                                         {Type::kFloat, "threshold", "MZL"},
                                         {Type::kWeight, "w1", "FE"},
                                         {Type::kWeight, "w2t", "FE"},
                                         {Type::kFloat, "scales", "F2"},
                                         {Type::kFloat, "b1", "F"},
                                         {Type::kFloat, "b2", "E"}},
                                        {{Type::kActivation, "y", "BSE"}, {Type::kInt64, "read", "2"}}},
                                       {{Kind::kInt, "layer", 0, INT32_MAX},
                                        {Kind::kInt, "block", 1, INT32_MAX},
                                        {Kind::kInt, "skip_zeros", 0, 1}}};
  return *spec;
}

class SparseFfn final : public Plugin {
 public:
  SparseFfn(std::string node, Values values) : Plugin(Spec(), std::move(node), std::move(values)) {}

 protected:
  std::unique_ptr<Plugin> Copy() const override { return std::make_unique<SparseFfn>(node_, values()); }

  bool Check(const Sizes& sizes) const override {
    const int64_t block = IntField(kBlock), neurons = sizes['F'];
    const int64_t units = neurons == kUnknown ? kUnknown : neurons / block + (neurons % block != 0);
    return ExpectMask(sizes, IntField(kLayer), units, "ceil(F / block)");
  }

  int Status(const Call& call) const override {
    const shadowc_ffn args = Arguments(call);
    return shadowc_ffn_check(&args);
  }

  size_t Workspace(const Call& call) const override {
    const shadowc_ffn args = Arguments(call);
    return shadowc_ffn_workspace(&args);
  }

  int Enqueue(const Call& call) const override {
    const shadowc_ffn args = Arguments(call);
    return shadowc_ffn_enqueue(&args, call.workspace, call.stream);
  }

 private:
  shadowc_ffn Arguments(const Call& call) const {
    shadowc_ffn args{};
    args.act = call.activation;
    args.weight = call.weight;
    args.batch = call.sizes.Int('B');
    args.tokens = call.sizes.Int('S');
    args.hidden = call.sizes.Int('E');
    args.neurons = call.sizes.Int('F');
    args.block = IntField(kBlock);
    args.skip_zeros = IntField(kSkipZeros);
    args.mask = call.Mask(kScores, kThreshold, IntField(kLayer));
    args.x = call.In<void>(kX);
    args.w1 = call.In<void>(kW1);
    args.w2t = call.In<void>(kW2t);
    args.scales = call.In<float>(kScales);
    args.b1 = call.In<float>(kB1);
    args.b2 = call.In<float>(kB2);
    args.y = call.Out<void>(kY);
    args.read = call.Out<int64_t>(kRead);
    return args;
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* SparseFfnCreator() {
  static auto* creator = new Creator(Spec(), [](std::string node, Values values) -> std::unique_ptr<Plugin> {
    return std::make_unique<SparseFfn>(std::move(node), std::move(values));
  });
  return creator;
}

}  // namespace shadowc::trt
