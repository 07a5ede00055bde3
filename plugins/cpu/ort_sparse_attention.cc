// SPDX-License-Identifier: Apache-2.0
// SparseAttention as an ONNX Runtime operator: checks shapes and cache positions, then calls the kernel
// (sparse_attention.h).
#include <cstdint>

#include "arena.h"
#include "ort_op.h"
#include "sparse_attention.h"

namespace shadowc {
namespace {

constexpr const char* kName = "SparseAttention";
enum In : size_t {
  kX,
  kScores,
  kThreshold,
  kW,
  kScales,
  kBqkv,
  kBo,
  kPastKey,
  kPastValue,
  kStart,
  kPast,
  kNorm,
  kNormBias,
  kInputs
};
enum Out : size_t { kY, kPresentKey, kPresentValue, kContext, kRead, kOutputs };

// Positions decide which memory is touched: every row is checked on every call.
void CheckPositions(const Input<int64_t>& start, const Input<int64_t>& past, int64_t batch, int64_t tokens,
                    int64_t capacity, Problems* problems) {
  problems->ExpectShape("start", start.shape, {batch}, "[B]");
  problems->ExpectShape("past", past.shape, {batch}, "[B]");
  problems->ThrowIfAny();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t p = past.data[b], s = start.data[b];
    if (p >= 0 && p <= capacity - tokens && s >= 0 && s - tokens <= p) continue;
    const std::string row = "[" + std::to_string(b) + "]";
    if (p < 0) problems->Add("past" + row, "at least 0", std::to_string(p));
    if (p > capacity - tokens)
      problems->Add("past" + row + " + S", "at most the cache capacity T = " + std::to_string(capacity),
                    std::to_string(p) + " + " + std::to_string(tokens));
    if (s < 0 || s - tokens > p)
      problems->Add("start" + row,
                    "in 0 ... past + S = " + std::to_string(p) + " + " + std::to_string(tokens),
                    std::to_string(s));
  }
}

// One buffer for both, or two that have nothing in common.
void CheckDistinct(const void* past, const void* present, const Shape& shape, CacheType type,
                   const char* name, Problems* problems) {
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  const auto from = reinterpret_cast<uintptr_t>(past), to = reinterpret_cast<uintptr_t>(present);
  const size_t distance = from < to ? to - from : from - to;
  if (distance == 0 || distance >= count * BytesOf(type)) return;
  problems->Add(name, "the memory of its past or memory of its own", "memory that overlaps it in part");
}

template <CacheType kCache>
using CacheElement = std::conditional_t<kCache == CacheType::kFloat16, Ort::Float16_t, float>;

template <CacheType kCache>
class SparseAttentionKernel : public Kernel {
 public:
  explicit SparseAttentionKernel(const Node& node)
      : node_(node.Name()), inputs_(node, kInputs), layer_(node.Int("layer", 0)) {
    const std::string kv = node.Text("kv", "all");
    Problems problems(kName, node_);
    if (kv != "all" && kv != "active") problems.Add("attribute kv", "'all' or 'active'", "'" + kv + "'");
    CheckFewDigits(node, &problems);
    CheckWeightType(node, kW, &problems);
    problems.ThrowIfAny();
    kv_active_only_ = kv == "active";
    rounding_ = RoundingOf(node);
    int4_digits_ = Int4DigitsOf(node);
    epsilon_ = node.Float(kEpsilon, kDefaultEpsilon);
  }

 private:
  void Compute(Call& call) const override {
    Problems problems(kName, node_);
    const Input<float> x = inputs_.Read<float>(call, kX), scales = inputs_.Read<float>(call, kScales);
    const Input<float> bqkv = inputs_.Read<float>(call, kBqkv), bo = inputs_.Read<float>(call, kBo);
    using C = CacheElement<kCache>;
    const Input<C> key = inputs_.Read<C>(call, kPastKey), value = inputs_.Read<C>(call, kPastValue);
    const Input<int64_t> start = inputs_.Read<int64_t>(call, kStart),
                         past = inputs_.Read<int64_t>(call, kPast);
    const Weights w = inputs_.ReadWeights(call, kW, &problems);
    problems.ExpectRank("x", x.shape, 3, "[B, S, E]");
    problems.ExpectRank("w", w.shape, 4, "[H, 4, D, E]");
    problems.ExpectRank("past_key", key.shape, 4, "[B, H, T, D]");
    problems.ThrowIfAny();
    const int64_t batch = x.shape[0], tokens = x.shape[1], width = x.shape[2];
    const int64_t heads = w.shape[0], size = w.shape[2], capacity = key.shape[2];
    if (width < 1) problems.Add("E (axis 2 of x)", "at least 1", "0");
    if (heads * size != width)
      problems.Add("H * D (axes 0 and 2 of w)", "E = " + std::to_string(width),
                   std::to_string(heads) + " * " + std::to_string(size));
    ExpectWeights(w, scales.shape, {heads, 4, size}, width, "H, 4, D", &problems);
    problems.ExpectShape("bqkv", bqkv.shape, {heads, 3, size}, "[H, 3, D]");
    problems.ExpectShape("bo", bo.shape, {width}, "[E]");
    problems.ExpectShape("past_key", key.shape, {batch, heads, capacity, size}, "[B, H, T, D]");
    problems.ExpectShape("past_value", value.shape, {batch, heads, capacity, size}, "[B, H, T, D]");
    AttentionArgs a{};
    a.norm = inputs_.ReadNorm(call, kNorm, width, epsilon_, &problems);
    a.selection = inputs_.ReadSelection(call, kScores, kThreshold, layer_, batch, tokens, heads,
                                        "H, axis 0 of w", &problems);
    CheckPositions(start, past, batch, tokens, capacity, &problems);
    problems.ThrowIfAny();
    a.x = x.data;
    a.batch = static_cast<size_t>(batch);
    a.tokens = static_cast<size_t>(tokens);
    a.width = static_cast<size_t>(width);
    a.type = w.type;
    a.w = w.data;
    a.scales = scales.data;
    a.bqkv = bqkv.data;
    a.bo = bo.data;
    a.heads = static_cast<size_t>(heads);
    a.head_size = static_cast<size_t>(size);
    a.capacity = static_cast<size_t>(capacity);
    a.cache = kCache;
    a.past_key = key.data;
    a.past_value = value.data;
    a.start = start.data;
    a.past = past.data;
    a.kv_active_only = kv_active_only_;
    a.rounding = a.selection.tail < a.tokens ? rounding_ : Rounding::kNone;
    a.int4_digits = int4_digits_;
    a.y = Output<float>(call, kY, x.shape);
    a.present_key = Output<C>(call, kPresentKey, key.shape);
    a.present_value = Output<C>(call, kPresentValue, value.shape);
    CheckDistinct(a.past_key, a.present_key, key.shape, kCache, "present_key", &problems);
    CheckDistinct(a.past_value, a.present_value, value.shape, kCache, "present_value", &problems);
    problems.ThrowIfAny();
    a.context = Output<float>(call, kContext, x.shape);
    CallArena arena;
    if (a.context == nullptr) a.context = arena.Take<float>(a.batch * a.tokens * a.width);
    WriteRead(call, kRead, SparseAttention(a, call.Pool()));
  }

  std::string node_;
  Inputs inputs_;
  int64_t layer_;
  bool kv_active_only_ = false;
  Rounding rounding_ = Rounding::kNone;
  Int4Digits int4_digits_ = Int4Digits::kThree;
  float epsilon_ = kDefaultEpsilon;
};

// ONNX Runtime takes two operators of one name as one that has both signatures: an output's type cannot be
// left open as that of w is.
template <CacheType kCache>
struct SparseAttentionOpType : OpBase<SparseAttentionOpType<kCache>, SparseAttentionKernel<kCache>> {
  static constexpr size_t kRequiredInputs = kNorm, kRequiredOutputs = 3;
  const char* GetName() const { return kName; }
  size_t GetInputTypeCount() const { return kInputs; }
  size_t GetOutputTypeCount() const { return kOutputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    if (index == kW) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (index == kPastKey || index == kPastValue) return Ort::TypeToTensorType<CacheElement<kCache>>::type;
    const bool position = index == kStart || index == kPast;
    return position ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    if (index == kPresentKey || index == kPresentValue) return GetInputType(kPastKey);
    return index == kRead ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
};

}  // namespace

const OrtCustomOp* SparseAttentionOp() {
  static const SparseAttentionOpType<CacheType::kFloat32> op;
  return &op;
}

const OrtCustomOp* SparseAttentionFloat16Op() {
  static const SparseAttentionOpType<CacheType::kFloat16> op;
  return &op;
}

std::unique_ptr<Kernel> SparseAttentionKernelOf(const Node& node) {
  if (node.Type(kPastKey) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)
    return std::make_unique<SparseAttentionKernel<CacheType::kFloat16>>(node);
  return std::make_unique<SparseAttentionKernel<CacheType::kFloat32>>(node);
}

}  // namespace shadowc
