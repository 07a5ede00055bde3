// SPDX-License-Identifier: Apache-2.0
// What the two ways of writing activations in three signed bytes agree on: one row for the decode path
// (digits-inl.h), sixteen rows interleaved for prompts (panels_x86.cc).
#pragma once

namespace shadowc {

// The largest value of a row becomes this integer. Three digits reach 127 * 65793 = 8355711; a little less
// leaves room for the rounding of x * scale.
inline constexpr float kMostDigits = 8355000.0f;

// Whether a row with this largest magnitude has digits. Not if it is tiny, infinite or NaN: it stays in
// floats.
inline constexpr float kLeastWithDigits = 1e-30f, kMostWithDigits = 1e30f;
constexpr bool HasDigits(float largest) { return largest > kLeastWithDigits && largest < kMostWithDigits; }

}  // namespace shadowc
