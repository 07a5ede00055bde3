// SPDX-License-Identifier: Apache-2.0
// SparseAttention as a TensorRT plugin. present_key and present_value share the memory of past_key and
// past_value.
#include "plugin.h"

namespace shadowc::trt {
namespace {

enum In : int {
  kX,
  kScores,
  kThreshold,
  kWq,
  kWk,
  kWv,
  kWot,
  kScales,
  kBqkv,
  kBo,
  kPastKey,
  kPastValue,
  kStart,
  kPast
};
enum Out : int { kY, kPresentKey, kPresentValue, kContext, kRead };
enum Field : size_t { kLayer, kKv };

// Never destroyed, like the creator: TensorRT may look at both while the process ends.
const OpSpec& Spec() {
  using Type = Operand::Type;
  using Kind = FieldSpec::Kind;
  static const auto* spec =
      new OpSpec{{"SparseAttention",
                  {{Type::kActivation, "x", "BSE"},
                   {Type::kFloat, "scores", "MZLN"},
                   {Type::kFloat, "threshold", "MZL"},
                   {Type::kWeight, "wq", "RE"},
                   {Type::kWeight, "wk", "RE"},
                   {Type::kWeight, "wv", "RE"},
                   {Type::kWeight, "wot", "RE"},
                   {Type::kFloat, "scales", "H4D"},
                   {Type::kFloat, "bqkv", "H3D"},
                   {Type::kFloat, "bo", "E"},
                   {Type::kActivation, "past_key", "BHTD"},
                   {Type::kActivation, "past_value", "BHTD"},
                   {Type::kInt64, "start", "B"},
                   {Type::kInt64, "past", "B"}},
                  {{Type::kActivation, "y", "BSE"},
                   {Type::kActivation, "present_key", "BHTD", kPastKey},
                   {Type::kActivation, "present_value", "BHTD", kPastValue},
                   {Type::kActivation, "context", "BSE"},
                   {Type::kInt64, "read", "2"}}},
                 {{Kind::kInt, "layer", 0, INT32_MAX}, {Kind::kChoice, "kv", 0, 0, 1, {"all", "active"}}}};
  return *spec;
}

// Those of the OPT family, and 32; the kernels are tested with these.
constexpr int64_t kHeadSizes[] = {32, 64, 80, 96, 128};

class SparseAttention final : public Plugin {
 public:
  SparseAttention(std::string node, Values values) : Plugin(Spec(), std::move(node), std::move(values)) {}

 protected:
  std::unique_ptr<Plugin> Copy() const override { return std::make_unique<SparseAttention>(node_, values()); }

  bool Check(const Sizes& sizes) const override {
    const int64_t heads = sizes['H'], head_size = sizes['D'], hidden = sizes['E'];
    bool good = ExpectMask(sizes, IntField(kLayer), heads, "heads (H)");
    if (head_size != kUnknown) {
      bool supported = false;
      for (const int64_t size : kHeadSizes) supported |= head_size == size;
      good &= Expect(supported, "head size (D)", "32, 64, 80, 96 or 128", std::to_string(head_size));
    }
    if (heads == kUnknown || head_size == kUnknown) return good;
    const std::string product = "H * D = " + std::to_string(heads) + " * " + std::to_string(head_size);
    if (hidden != kUnknown) {
      good &= Expect(hidden == heads * head_size, "hidden size (E)", product, std::to_string(hidden));
    }
    if (sizes['R'] != kUnknown) {
      good &= Expect(sizes['R'] == heads * head_size, "rows of wq (R)", product, std::to_string(sizes['R']));
    }
    return good;
  }

  int Status(const Call& call) const override {
    const shadowc_attention args = Arguments(call);
    return shadowc_attention_check(&args);
  }

  size_t Workspace(const Call& call) const override {
    const shadowc_attention args = Arguments(call);
    return shadowc_attention_workspace(&args);
  }

  int Enqueue(const Call& call) const override {
    const shadowc_attention args = Arguments(call);
    return shadowc_attention_enqueue(&args, call.workspace, call.stream);
  }

 private:
  shadowc_attention Arguments(const Call& call) const {
    shadowc_attention args{};
    args.act = call.activation;
    args.weight = call.weight;
    args.batch = call.sizes.Int('B');
    args.tokens = call.sizes.Int('S');
    args.hidden = call.sizes.Int('E');
    args.heads = call.sizes.Int('H');
    args.head_size = call.sizes.Int('D');
    args.capacity = call.sizes.Int('T');
    args.kv_active = IntField(kKv);
    args.mask = call.Mask(kScores, kThreshold, IntField(kLayer));
    args.x = call.In<void>(kX);
    args.wq = call.In<void>(kWq);
    args.wk = call.In<void>(kWk);
    args.wv = call.In<void>(kWv);
    args.wot = call.In<void>(kWot);
    args.scales = call.In<float>(kScales);
    args.bqkv = call.In<float>(kBqkv);
    args.bo = call.In<float>(kBo);
    args.past_key = call.In<void>(kPastKey);
    args.past_value = call.In<void>(kPastValue);
    args.present_key = call.Out<void>(kPresentKey);
    args.present_value = call.Out<void>(kPresentValue);
    args.start = call.In<int64_t>(kStart);
    args.past = call.In<int64_t>(kPast);
    args.y = call.Out<void>(kY);
    args.context = call.Out<void>(kContext);
    args.read = call.Out<int64_t>(kRead);
    return args;
  }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* SparseAttentionCreator() {
  static auto* creator = new Creator(Spec(), [](std::string node, Values values) -> std::unique_ptr<Plugin> {
    return std::make_unique<SparseAttention>(std::move(node), std::move(values));
  });
  return creator;
}

}  // namespace shadowc::trt
