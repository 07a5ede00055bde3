// SPDX-License-Identifier: Apache-2.0
// Which SIMD target runs. The best one the CPU has, unless the environment variable SHADOWC_ISA limits it: a
// name such as avx2, meaning "this level or lower", or "native" for no limit.
#pragma once

#include <string>

namespace shadowc {

// Reads SHADOWC_ISA once, on the first call. Returns an empty string, or a sentence that says what is wrong.
const std::string& ApplyIsaLimit();

// The name of the target that kernels run on; empty if there is a problem.
const char* ChosenIsa();

}  // namespace shadowc
