// SPDX-License-Identifier: Apache-2.0
// Which SIMD target runs. The best one the CPU has, unless the environment variable SHADOWC_ISA limits it: a
// name from IsaNames(), meaning "this level or lower", or "native" for no limit.
#pragma once

#include <string>

namespace shadowc {

// Reads SHADOWC_ISA once, on the first call. Returns an empty string, or a sentence that says what is wrong.
const std::string& ApplyIsaLimit();

// Our name of the target that kernels run on.
const char* ChosenIsa();

}  // namespace shadowc
