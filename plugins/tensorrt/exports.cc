// SPDX-License-Identifier: Apache-2.0
// What TensorRT's load_library calls: the only two symbols of the library.
#include "host.h"
#include "log.h"
#include "plugin.h"

#define SHADOWC_EXPORT extern "C" __attribute__((visibility("default")))

SHADOWC_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  shadowc::trt::SetLoggerFinder(finder);
}

// The creators; none, with the reason logged, where the calling TensorRT is not one that these headers
// describe.
SHADOWC_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  const shadowc::trt::Library library = shadowc::trt::FindLibrary(__builtin_return_address(0));
  shadowc::trt::AllowLogger(shadowc::trt::SameTables(library));
  const std::string refusal = shadowc::trt::Refusal(library);
  if (!refusal.empty()) shadowc::trt::Error(refusal);
  count = refusal.empty() ? shadowc::trt::kCreators : 0;
  return shadowc::trt::Creators();
}
