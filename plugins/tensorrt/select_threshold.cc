// SPDX-License-Identifier: Apache-2.0
// SelectThreshold as a TensorRT plugin.
#include "plugin.h"

namespace shadowc::trt {
namespace {

enum In : int { kScores, kDensity };
enum Out : int { kThreshold, kActive };
enum Field : size_t { kScope, kExempt, kMinActive };

// Never destroyed, like the creator: TensorRT may look at both while the process ends.
const OpSpec& Spec() {
  using Type = Operand::Type;
  using Kind = FieldSpec::Kind;
  static const auto* spec =
      new OpSpec{{"SelectThreshold",
                  {{Type::kFloat, "scores", "BZLN"}, {Type::kFloat, "density", "M"}},
                  {{Type::kFloat, "threshold", "BZL"}, {Type::kInt32, "active", "BZL"}}},
                 {{Kind::kChoice, "scope", 0, 0, 1, {"local", "global"}},
                  {Kind::kInts, "exempt", -1, INT32_MAX, SHADOWC_MAX_LAYERS},
                  {Kind::kInt, "min_active", 0, INT32_MAX}}};
  return *spec;
}

class SelectThreshold final : public Plugin {
 public:
  SelectThreshold(std::string node, Values values) : Plugin(Spec(), std::move(node), std::move(values)) {}

 protected:
  std::unique_ptr<Plugin> Copy() const override { return std::make_unique<SelectThreshold>(node_, values()); }

  bool Check(const Sizes& sizes) const override {
    bool good = true;
    if (sizes['M'] != kUnknown && sizes['B'] != kUnknown) {
      good &= Expect(sizes['M'] == 1 || sizes['M'] == sizes['B'], "input density",
                     "1 or B = " + std::to_string(sizes['B']) + " values", std::to_string(sizes['M']));
    }
    if (sizes['L'] != kUnknown) {
      good &= Expect(sizes['L'] >= 1 && sizes['L'] <= SHADOWC_MAX_LAYERS, "layers of scores (L)",
                     "1 to " + std::to_string(SHADOWC_MAX_LAYERS), std::to_string(sizes['L']));
    }
    return good;
  }

  int Status(const Call& call) const override {
    const shadowc_select args = Arguments(call);
    return shadowc_select_check(&args);
  }

  size_t Workspace(const Call& call) const override {
    const shadowc_select args = Arguments(call);
    return shadowc_select_workspace(&args);
  }

  int Enqueue(const Call& call) const override {
    const shadowc_select args = Arguments(call);
    return shadowc_select_enqueue(&args, call.workspace, call.stream);
  }

 private:
  shadowc_select Arguments(const Call& call) const {
    shadowc_select args{};
    args.batch = call.sizes.Int('B');
    args.tail = call.sizes.Int('Z');
    args.layers = call.sizes.Int('L');
    args.units = call.sizes.Int('N');
    args.global = IntField(kScope);
    args.min_active = IntField(kMinActive);
    args.density_batch = call.sizes.Int('M');
    args.exempt_count = static_cast<int>(values()[kExempt].ints.size());
    args.exempt = values()[kExempt].ints.data();
    args.scores = call.In<float>(kScores);
    args.density = call.In<float>(kDensity);
    args.threshold = call.Out<float>(kThreshold);
    args.active = call.Out<int32_t>(kActive);
    return args;
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* SelectThresholdCreator() {
  static auto* creator = new Creator(Spec(), [](std::string node, Values values) -> std::unique_ptr<Plugin> {
    return std::make_unique<SelectThreshold>(std::move(node), std::move(values));
  });
  return creator;
}

}  // namespace shadowc::trt
