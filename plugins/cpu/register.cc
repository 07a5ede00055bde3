// SPDX-License-Identifier: Apache-2.0
// Everything the library exports.
#include "isa.h"
#include "ort_op.h"
#include "round_trip.h"
#include "stream.h"

static_assert(ORT_API_VERSION == 21,
              "build against the ONNX Runtime 1.21 headers: newer ones shut out old runtimes");

#define SHADOWC_EXPORT extern "C" __attribute__((visibility("default")))

// Called by ONNX Runtime (register_custom_ops_library).
SHADOWC_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    const std::string text = std::string("libshadowc_ort needs ONNX Runtime 1.21 or newer, found ") +
                             base->GetVersionString() + "; upgrade onnxruntime";
    return base->GetApi(1)->CreateStatus(ORT_FAIL, text.c_str());
  }
  Ort::InitApi(api);
  return shadowc::AsStatus([&] {
    const std::string& problem = shadowc::ApplyIsaLimit();
    if (!problem.empty()) throw Ort::Exception(std::string(problem), ORT_INVALID_ARGUMENT);
    // Lives as long as the library: sessions keep pointers into it.
    static const Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made("shadowc");
      made.Add(shadowc::ChainOp());
      made.Add(shadowc::MatMulRowsOp());
      made.Add(shadowc::PredictUnitsOp());
      made.Add(shadowc::SelectThresholdOp());
      made.Add(shadowc::SparseAttentionOp());
      made.Add(shadowc::SparseAttentionFloat16Op());
      made.Add(shadowc::SparseFfnOp());
      return made;
    }();
    Ort::ThrowOnError(Ort::GetApi().AddCustomOpDomain(options, domain));
  });
}

SHADOWC_EXPORT const char* shadowc_ort_version(void) { return SHADOWC_VERSION; }

SHADOWC_EXPORT int shadowc_ort_api(void) { return ORT_API_VERSION; }

// The SIMD level in use, or an empty string if SHADOWC_ISA is wrong (registration then says why).
SHADOWC_EXPORT const char* shadowc_ort_isa(void) { return shadowc::ChosenIsa(); }

SHADOWC_EXPORT double shadowc_round_trip(int repeats) { return shadowc::RoundTrip(repeats); }

SHADOWC_EXPORT double shadowc_stream_read(size_t bytes, int threads, int repeats) {
  return shadowc::ApplyIsaLimit().empty() ? shadowc::StreamRead(bytes, threads, repeats) : 0.0;
}

SHADOWC_EXPORT double shadowc_stream_over(const void* memory, size_t bytes, int threads, int repeats) {
  if (!shadowc::ApplyIsaLimit().empty()) return 0.0;
  return shadowc::StreamOver(static_cast<const std::byte*>(memory), bytes, threads, repeats);
}
