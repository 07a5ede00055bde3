// SPDX-License-Identifier: Apache-2.0
// The twin for hosts that only dlopen a plugin (Triton's `plugins=`, trtexec --staticPlugins): it registers
// itself when it is loaded. TensorRT has to be in the process by then. It exports nothing, and stays loaded,
// so that a host that gives it to load_library by mistake gets an error and no dangling creators.
#include <dlfcn.h>

#include "host.h"
#include "log.h"
#include "plugin.h"

namespace shadowc::trt {
namespace {

__attribute__((constructor)) void RegisterAll() {
  const Library library = FindLibrary(nullptr);
  std::string refusal = Refusal(library);
  if (refusal.empty() && !SameTables(library)) {
    refusal =
        "the self-registering plugin cannot use the registry of " + library.file +
        ", whose version differs from the headers it was built with: give the other library to load_library, "
        "or set TENSORRT_INCLUDE_DIR to matching headers and build again";
  }
  auto* registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(
      refusal.empty() ? dlsym(library.handle, "getPluginRegistry") : nullptr);
  if (refusal.empty() && registry == nullptr) refusal = library.file + " has no plugin registry";
  if (!refusal.empty()) return Error(refusal);
  for (int32_t i = 0; i < kCreators; ++i) {
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(Creators()[i]);
    if (registry()->registerCreator(*creator, creator->getPluginNamespace())) continue;
    Warn(std::string(creator->getPluginName()) + " is registered already; the first one stays");
  }
}

}  // namespace
}  // namespace shadowc::trt
