// SPDX-License-Identifier: Apache-2.0
#include "operators.h"

#include <stdexcept>
#include <string>

#include "matmul_rows.h"
#include "predict_units.h"
#include "select_threshold.h"
#include "sparse_attention.h"
#include "sparse_ffn.h"

namespace {

shadowc::WeightType WeightTypeOf(const Tensor& w) {
  if (w.type == "float32") return shadowc::WeightType::kFloat32;
  if (w.type == "bfloat16") return shadowc::WeightType::kBFloat16;
  if (w.type == "int8") return shadowc::WeightType::kInt8;
  if (w.type == "uint8") return shadowc::WeightType::kInt4;
  throw std::runtime_error("no weights of type '" + w.type + "'");
}

shadowc::Selection SelectionOf(const Call& call) {
  const Tensor &scores = call.Input("scores"), &threshold = call.Input("threshold");
  shadowc::Selection s;
  s.scores = scores.As<float>();
  s.threshold = threshold.As<float>();
  s.scores_batch = scores.shape[0];
  s.threshold_batch = threshold.shape[0];
  s.tail = scores.shape[1];
  s.layers = scores.shape[2];
  s.units = scores.shape[3];
  s.layer = static_cast<size_t>(call.Int("layer", 0));
  return s;
}

shadowc::Norm NormOf(const Call& call) {
  if (call.inputs.count("norm_scale") == 0) return {};
  return {call.Input("norm_scale").As<float>(), call.Input("norm_bias").As<float>(),
          std::stof(call.Text("epsilon", "1e-5"))};
}

Tensor ReadOf(const shadowc::ReadCount& read) {
  Tensor tensor = Unwritten("int64", {2});
  tensor.As<int64_t>()[0] = read.records;
  tensor.As<int64_t>()[1] = read.bytes;
  return tensor;
}

Tensors SelectThreshold(const Call& call, const shadowc::Parallel& parallel) {
  const Tensor &scores = call.Input("scores"), &density = call.Input("density");
  const std::vector<size_t> per_layer(scores.shape.begin(), scores.shape.end() - 1);
  Tensors outputs = {{"threshold", Unwritten("float32", per_layer)},
                     {"active", Unwritten("int32", per_layer)}};
  shadowc::SelectArgs a{};
  a.scores = scores.As<float>();
  a.density = density.As<float>();
  a.batch = scores.shape[0], a.tail = scores.shape[1], a.layers = scores.shape[2], a.units = scores.shape[3];
  a.density_count = density.shape[0];
  a.global = call.Text("scope", "local") == "global";
  a.exempt.assign(a.layers, 0);
  for (const int64_t layer : call.Ints("exempt")) {
    if (layer >= 0 && layer < static_cast<int64_t>(a.layers)) a.exempt[static_cast<size_t>(layer)] = 1;
  }
  a.min_active = static_cast<size_t>(call.Int("min_active", 0));
  a.threshold = outputs["threshold"].As<float>();
  a.active = outputs["active"].As<int32_t>();
  shadowc::SelectThreshold(a, parallel);
  return outputs;
}

Tensors MatMulRows(const Call& call, const shadowc::Parallel& parallel) {
  const Tensor &x = call.Input("x"), &w = call.Input("w");
  Tensors outputs = {{"y", Unwritten("float32", {x.shape[0], x.shape[1], w.shape[0]})}};
  shadowc::MatMulRowsArgs a{};
  a.x = x.As<float>();
  a.rows = x.shape[0] * x.shape[1], a.width = x.shape[2];
  a.w = w.As<int8_t>();
  a.scales = call.Input("scales").As<float>();
  a.outputs = w.shape[0];
  a.y = outputs["y"].As<float>();
  shadowc::MatMulRows(a, parallel);
  return outputs;
}

Tensors PredictUnits(const Call& call, const shadowc::Parallel& parallel) {
  const Tensor &x = call.Input("x"), &w1 = call.Input("w1"), &w2 = call.Input("w2");
  const Tensor& density = call.Input("density");
  shadowc::PredictArgs a{};
  a.x = x.As<float>();
  a.norm = NormOf(call);
  a.batch = x.shape[0], a.tokens = x.shape[1], a.width = x.shape[2];
  a.tail = static_cast<size_t>(*call.Input("tail").As<int64_t>());
  a.type = WeightTypeOf(w1);
  a.w1 = w1.bytes.data(), a.w2 = w2.bytes.data();
  a.scales1 = call.Input("scales1").As<float>(), a.scales2 = call.Input("scales2").As<float>();
  a.b1 = call.Input("b1").As<float>(), a.b2 = call.Input("b2").As<float>();
  a.hidden = w1.shape[0], a.units = call.Input("b2").shape[0];
  a.relu = call.Int("relu", 0) != 0;
  a.density = density.As<float>();
  a.is_threshold = call.Text("select", "density") == "threshold";
  a.density_batch = density.shape[0], a.densities = density.shape[1];
  a.column = static_cast<size_t>(call.Int("column", 0));
  a.exempt = call.Int("exempt", 0) != 0;
  a.min_active = static_cast<size_t>(call.Int("min_active", 0));
  Tensors outputs = {{"scores", Unwritten("float32", {a.batch, a.tail, 1, a.units})},
                     {"threshold", Unwritten("float32", {a.batch, a.tail, 1})},
                     {"active", Unwritten("int32", {a.batch, a.tail, 1})},
                     {"last_scores", Unwritten("float32", {a.batch, 1, 1, a.units})}};
  a.scores = outputs["scores"].As<float>();
  a.threshold = outputs["threshold"].As<float>();
  a.active = outputs["active"].As<int32_t>();
  a.last = outputs["last_scores"].As<float>();
  shadowc::PredictUnits(a, parallel);
  return outputs;
}

// Prompts are not rounded here: of attribute few_digits this is what tokens make.
shadowc::Int4Digits Int4DigitsOf(const Call& call) {
  return call.Int("few_digits", 0) == 1 ? shadowc::Int4Digits::kOne : shadowc::Int4Digits::kThree;
}

Tensors SparseFfn(const Call& call, const shadowc::Parallel& parallel) {
  const Tensor &x = call.Input("x"), &w = call.Input("w");
  Tensors outputs = {{"y", Unwritten("float32", x.shape)}};
  shadowc::FfnArgs a{};
  a.x = x.As<float>();
  a.batch = x.shape[0], a.tokens = x.shape[1], a.width = x.shape[2];
  a.norm = NormOf(call);
  a.selection = SelectionOf(call);
  a.type = WeightTypeOf(w);
  a.w = w.bytes.data();
  a.scales = call.Input("scales").As<float>();
  a.b1 = call.Input("b1").As<float>();
  a.b2 = call.Input("b2").As<float>();
  a.neurons = w.shape[0];
  a.block = static_cast<size_t>(call.Int("block", 1));
  a.skip_zeros = call.Int("skip_zeros", 0) != 0;
  a.int4_digits = Int4DigitsOf(call);
  a.y = outputs["y"].As<float>();
  outputs["read"] = ReadOf(shadowc::SparseFfn(a, parallel));
  return outputs;
}

Tensors SparseAttention(const Call& call, const shadowc::Parallel& parallel) {
  const Tensor &x = call.Input("x"), &w = call.Input("w");
  const Tensor &past_key = call.Input("past_key"), &past_value = call.Input("past_value");
  const bool in_place = call.Int("in_place", 0) != 0;
  const auto present = [&](const Tensor& past) { return in_place ? past : Unwritten(past.type, past.shape); };
  Tensors outputs = {{"y", Unwritten("float32", x.shape)},
                     {"context", Unwritten("float32", x.shape)},
                     {"present_key", present(past_key)},
                     {"present_value", present(past_value)}};
  shadowc::AttentionArgs a{};
  a.x = x.As<float>();
  a.batch = x.shape[0], a.tokens = x.shape[1], a.width = x.shape[2];
  a.norm = NormOf(call);
  a.selection = SelectionOf(call);
  a.type = WeightTypeOf(w);
  a.w = w.bytes.data();
  a.scales = call.Input("scales").As<float>();
  a.bqkv = call.Input("bqkv").As<float>();
  a.bo = call.Input("bo").As<float>();
  a.heads = w.shape[0], a.head_size = w.shape[2], a.capacity = past_key.shape[2];
  a.cache = past_key.type == "float16" ? shadowc::CacheType::kFloat16 : shadowc::CacheType::kFloat32;
  a.present_key = outputs["present_key"].bytes.data();
  a.present_value = outputs["present_value"].bytes.data();
  a.past_key = in_place ? a.present_key : past_key.bytes.data();
  a.past_value = in_place ? a.present_value : past_value.bytes.data();
  a.int4_digits = Int4DigitsOf(call);
  a.start = call.Input("start").As<int64_t>();
  a.past = call.Input("past").As<int64_t>();
  a.kv_active_only = call.Text("kv", "all") == "active";
  a.y = outputs["y"].As<float>();
  a.context = outputs["context"].As<float>();
  outputs["read"] = ReadOf(shadowc::SparseAttention(a, parallel));
  return outputs;
}

}  // namespace

Tensors Run(const Call& call, const shadowc::Parallel& parallel) {
  if (call.op == "MatMulRows") return MatMulRows(call, parallel);
  if (call.op == "PredictUnits") return PredictUnits(call, parallel);
  if (call.op == "SelectThreshold") return SelectThreshold(call, parallel);
  if (call.op == "SparseFFN") return SparseFfn(call, parallel);
  if (call.op == "SparseAttention") return SparseAttention(call, parallel);
  throw std::runtime_error("no such operator: '" + call.op + "'");
}
