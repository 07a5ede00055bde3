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

// Highway numbers better targets lower, so "this level or lower" are the bits from the level's own upwards.
std::string Limit() {
  const char* asked = std::getenv("SHADOWC_ISA");
  if (asked == nullptr || *asked == '\0' || std::string(asked) == "native") return "";
  for (const Level& level : kLevels) {
    if (asked != std::string(level.name) || !Compiled(level)) continue;
    if ((hwy::SupportedTargets() & level.target) == 0) {
      return "SHADOWC_ISA is '" + std::string(asked) +
             "', which this CPU does not have; its best level is '" + ChosenIsa() +
             "'. Unset SHADOWC_ISA or name a lower level.";
    }
    hwy::DisableTargets(level.target - 1);
    return "";
  }
  return "SHADOWC_ISA is '" + std::string(asked) + "'; expected one of " + Names() + ".";
}

}  // namespace

const std::string& ApplyIsaLimit() {
  static const std::string problem = Limit();
  return problem;
}

const char* ChosenIsa() {
  const int64_t usable = hwy::SupportedTargets() & HWY_TARGETS;
  const int64_t best = usable & -usable;
  for (const Level& level : kLevels) {
    if (level.target == best) return level.name;
  }
  return hwy::TargetName(best);
}

}  // namespace shadowc
