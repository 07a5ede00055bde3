// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>

#include "hwy/highway.h"

namespace shadowc {
namespace {

struct Level {
  const char* name;
  int64_t target;
};

// Lowest first, within one architecture.
constexpr Level kLevels[] = {
#if HWY_ARCH_X86
    {"sse2", HWY_SSE2},
    {"ssse3", HWY_SSSE3},
    {"sse4", HWY_SSE4},
    {"avx2", HWY_AVX2},
    {"avx512", HWY_AVX3},
    {"avx512_icelake", HWY_AVX3_DL},
    {"avx512_zen4", HWY_AVX3_ZEN4},
#elif HWY_ARCH_ARM
    {"neon_without_aes", HWY_NEON_WITHOUT_AES},
    {"neon", HWY_NEON},
    {"neon_bf16", HWY_NEON_BF16},
    {"sve", HWY_SVE},
    {"sve2", HWY_SVE2},
    {"sve_256", HWY_SVE_256},
    {"sve2_128", HWY_SVE2_128},
#else
    {"baseline", HWY_STATIC_TARGET},
#endif
};

bool Compiled(const Level& level) { return (level.target & HWY_TARGETS) != 0; }

std::string Names() {
  std::string names;
  for (const Level& level : kLevels) {
    if (Compiled(level)) names += std::string(level.name) + ", ";
  }
  return names + "native";
}

struct Choice {
  std::string problem;
  const char* isa = "";
};

const char* NameOf(int64_t target) {
  for (const Level& level : kLevels) {
    if (level.target == target) return level.name;
  }
  return hwy::TargetName(target);
}

// Highway numbers better targets lower, so "this level or lower" are the bits from the level's own upwards.
// SupportedTargets() also resets the dispatch to all that the CPU has, so DisableTargets() must come last,
// and nothing may ask again.
Choice Choose() {
  const int64_t usable = hwy::SupportedTargets() & HWY_TARGETS;
  const char* best = NameOf(usable & -usable);
  const char* variable = std::getenv("SHADOWC_ISA");
  const std::string asked = variable == nullptr ? "" : variable;
  if (asked.empty() || asked == "native") return {"", best};
  for (const Level& level : kLevels) {
    if (asked != level.name || !Compiled(level)) continue;
    if ((usable & level.target) == 0) {
      return {"SHADOWC_ISA is '" + asked + "', which this CPU does not have; its best level is '" + best +
              "'. Unset SHADOWC_ISA or name a lower level."};
    }
    hwy::DisableTargets(level.target - 1);
    return {"", level.name};
  }
  return {"SHADOWC_ISA is '" + asked + "'; expected one of " + Names() + "."};
}

const Choice& TheChoice() {
  static const Choice choice = Choose();
  return choice;
}

}  // namespace

const std::string& ApplyIsaLimit() { return TheChoice().problem; }

const char* ChosenIsa() { return TheChoice().isa; }

}  // namespace shadowc
