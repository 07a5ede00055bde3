// SPDX-License-Identifier: Apache-2.0
#include "host.h"

#include <dlfcn.h>

namespace shadowc::trt {
namespace {

constexpr const char* kSonames[] = {"libtensorrt_rtx.so.1", "libnvinfer.so.11", "libnvinfer.so.10",
                                    "libnvinfer_lean.so.11", "libnvinfer_lean.so.10"};
// The first TensorRT for RTX that was seen to have the tables of the 11.x headers.
constexpr int32_t kRtxWithTablesOf11 = 10701;

Library Describe(void* handle, const char* file) {
  Library found;
  auto* version =
      handle == nullptr ? nullptr : reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibVersion"));
  if (version == nullptr) return found;
  found.version = version();
  found.family = FamilyOf(found.version / 10000);
  found.file = file;
  found.handle = handle;
  return found;
}

Library Loaded(const char* file) { return Describe(dlopen(file, RTLD_LAZY | RTLD_NOLOAD), file); }

std::string VersionText(int32_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

std::string Name(Family family) {
  switch (family) {
    case Family::kRtx1:
      return "TensorRT for RTX 1.x";
    case Family::kTrt10:
      return "TensorRT 10.x";
    case Family::kTrt11:
      return "TensorRT 11.x";
    default:
      return "another TensorRT";
  }
}

}  // namespace

Library FindLibrary(const void* caller) {
  Dl_info where{};
  if (caller != nullptr && dladdr(caller, &where) != 0 && where.dli_fname != nullptr) {
    const Library found = Loaded(where.dli_fname);
    if (found.family != Family::kNone) return found;
  }
  Library first;
  for (const char* soname : kSonames) {
    const Library found = Loaded(soname);
    if (found.family == Family::kNone) continue;
    if (Refusal(found).empty()) return found;
    if (first.family == Family::kNone) first = found;
  }
  return first;
}

bool SameTables(const Library& library) {
  if (library.family == Family::kRtx1 && kHeaders == Family::kTrt11)
    return library.version >= kRtxWithTablesOf11;
  return library.family == kHeaders;
}

std::string Refusal(const Library& library) {
  const std::string mine =
      "this plugin was built for " + Name(kHeaders) + " (headers " +
      VersionText(NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH) + ")";
  if (library.family == Family::kNone) {
    return mine + ", and no TensorRT is loaded in this process: load TensorRT first";
  }
  if (library.family == kHeaders || library.family == Family::kRtx1) return "";
  return mine + ", the process runs " + VersionText(library.version) + " (" + library.file +
         "): use the plugin built for that version, or set TENSORRT_INCLUDE_DIR to its headers and build "
         "again";
}

}  // namespace shadowc::trt
