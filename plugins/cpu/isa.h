// SPDX-License-Identifier: Apache-2.0
// Which SIMD target runs. The best one the CPU has, unless the environment variable SHADOWC_ISA limits it: a
// name such as avx2, meaning "this level or lower", or "native" for no limit.
#pragma once

#include <string>

namespace shadowc {

// Reads SHADOWC_ISA once, on the first call. Returns an empty string, or a sentence that says what is wrong.
const std::string& ApplyIsaLimit();

// Whether the chosen level is AVX2 (FMA and 16-bit floats come with it) and no better one.
bool IsAvx2();

// Whether the chosen level includes the 8-bit dot products of AVX-512 (VNNI; VBMI comes with them).
bool HasVnni();

// Whether the chosen level includes products of bf16 (AVX512_BF16), and VNNI.
bool HasBf16();

// Whether the chosen level is that of AMX's tiles, of int8 and of bf16.
bool HasAmx();

// The name of the target that kernels run on; empty if there is a problem.
const char* ChosenIsa();

}  // namespace shadowc
