// SPDX-License-Identifier: Apache-2.0
// Which TensorRT this plugin was compiled for, and which one it meets in the process. The plugin interfaces
// (IPluginV3*) are the same in TensorRT 10.x, 11.x and RTX 1.x; the tables of ILogger and IPluginRegistry are
// not.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#if NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3
#error \
    "TensorRT headers: expected 10.3 or newer (its plugins may update a cache in place), found 10.0 to 10.2; \
set TENSORRT_INCLUDE_DIR to newer headers"
#elif NV_TENSORRT_MAJOR != 1 && NV_TENSORRT_MAJOR != 10 && NV_TENSORRT_MAJOR != 11
#error \
    "TensorRT headers: expected 10.3 to 11.x, or TensorRT for RTX 1.x, found another major version; \
set TENSORRT_INCLUDE_DIR to one of these"
#endif

namespace shadowc::trt {

enum class Family : uint8_t { kNone, kRtx1, kTrt10, kTrt11, kOther };

constexpr Family FamilyOf(int32_t major) {
  return major == 1    ? Family::kRtx1
         : major == 10 ? Family::kTrt10
         : major == 11 ? Family::kTrt11
                       : Family::kOther;
}

inline constexpr Family kHeaders = FamilyOf(NV_TENSORRT_MAJOR);

// A TensorRT library in this process.
struct Library {
  Family family = Family::kNone;
  int32_t version = 0;     // getInferLibVersion(): major * 10000 + minor * 100 + patch
  std::string file;        // empty if there is none
  void* handle = nullptr;  // for dlsym; never closed
};

// The library that holds the code at `caller`. If that is no TensorRT, the loaded one that fits this plugin
// best.
Library FindLibrary(const void* caller);

// Whether objects that the library owns have the tables that these headers describe.
bool SameTables(const Library& library);

// Why the plugin must not work inside `library`, as a sentence; empty if it may.
std::string Refusal(const Library& library);

}  // namespace shadowc::trt
