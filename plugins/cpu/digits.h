// SPDX-License-Identifier: Apache-2.0
// What the two ways of writing activations in three signed bytes agree on: one row for the decode path
// (digits-inl.h), sixteen rows interleaved for prompts (panels_x86.cc).
#pragma once

#include <cstddef>

namespace shadowc {

// Of longer rows sums of products of bytes, 255 * 128 each at most, could leave int32: they stay in floats.
inline constexpr size_t kMostInDigits = size_t{1} << 16;

// The largest value of a row becomes this integer. Three digits reach 127 * 65793 = 8355711; a little less
// leaves room for the rounding of x * scale.
inline constexpr float kMostDigits = 8355000.0f;
// The same of two digits, which reach 127 * 257 = 32639, and of one.
inline constexpr float kMostTwoDigits = 32600.0f, kMostOneDigit = 127.0f;

// Whether a row with this largest magnitude has digits. Not if it is tiny, infinite or NaN: it stays in
// floats.
inline constexpr float kLeastWithDigits = 1e-30f, kMostWithDigits = 1e30f;
constexpr bool HasDigits(float largest) { return largest > kLeastWithDigits && largest < kMostWithDigits; }

}  // namespace shadowc
