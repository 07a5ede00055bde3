// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>

#include "hwy/highway.h"

#if HWY_ARCH_X86_64 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shadowc {
namespace {

// AMX is no target of Highway, which numbers better targets lower: as a level, it is better than all of them.
constexpr int64_t kAmx = 1;

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
    {"avx512_amx", kAmx},
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

#if HWY_ARCH_X86_64 && defined(__linux__) && (HWY_TARGETS & HWY_AVX3_DL)
constexpr int64_t kCompiled = HWY_TARGETS | kAmx;

// Linux gives a process the tiles' 8 KiB of registers only if it asks; threads that it has already may use
// them too.
bool AmxWorks() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

int64_t Usable() {
  const int64_t usable = hwy::SupportedTargets() & HWY_TARGETS;
  return (usable & HWY_AVX3_DL) != 0 && AmxWorks() ? usable | kAmx : usable;
}
#else
constexpr int64_t kCompiled = HWY_TARGETS;

int64_t Usable() { return hwy::SupportedTargets() & HWY_TARGETS; }
#endif

bool Compiled(const Level& level) { return (level.target & kCompiled) != 0; }

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
  int64_t target = 0;
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
  const int64_t usable = Usable();
  const int64_t best_target = usable & -usable;
  const char* best = NameOf(best_target);
  const char* variable = std::getenv("SHADOWC_ISA");
  const std::string asked = variable == nullptr ? "" : variable;
  if (asked.empty() || asked == "native") return {"", best, best_target};
  for (const Level& level : kLevels) {
    if (asked != level.name || !Compiled(level)) continue;
    if ((usable & level.target) == 0) {
      return {"SHADOWC_ISA is '" + asked + "', which this CPU does not have; its best level is '" + best +
              "'. Unset SHADOWC_ISA or name a lower level."};
    }
    hwy::DisableTargets(level.target - 1);
    return {"", level.name, level.target};
  }
  return {"SHADOWC_ISA is '" + asked + "'; expected one of " + Names() + "."};
}

const Choice& TheChoice() {
  static const Choice choice = Choose();
  return choice;
}

}  // namespace

const std::string& ApplyIsaLimit() { return TheChoice().problem; }

bool HasVnni() {
#if HWY_ARCH_X86
  return TheChoice().target != 0 && TheChoice().target <= HWY_AVX3_DL;
#else
  return false;
#endif
}

bool IsAvx2() {
#if HWY_ARCH_X86
  return TheChoice().target == HWY_AVX2;
#else
  return false;
#endif
}

bool HasBf16() {
#if HWY_ARCH_X86_64 && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 5;  // of eax
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return HasVnni() && TheChoice().target <= HWY_AVX3_ZEN4 &&
         __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kBf16) != 0;
#else
  return false;
#endif
}

bool HasAmx() { return TheChoice().target == kAmx; }

const char* ChosenIsa() { return TheChoice().isa; }

}  // namespace shadowc
