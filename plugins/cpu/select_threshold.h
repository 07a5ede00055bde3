// SPDX-License-Identifier: Apache-2.0
// SelectThreshold: the score a unit must reach to be computed, so that a wanted share of units is.
//
// Shapes: scores [rows, L, N] with rows = B * S', density [B] or [1], threshold and active [rows, L].
// k = floor(density * n + 0.5) in double, density clamped to [0, 1], NaN meaning 1; n counts the units of the
// layer (local) or of all non-exempt layers (global). The threshold is the k-th largest score, -inf for k =
// n, +inf for k = 0. NaN ranks as +inf. A unit is active iff !(score < threshold): ties make more active,
// never fewer. Exempt layers get -inf and do not count in n. min_active lowers a layer's threshold to at most
// its min_active-th largest score (its smallest, if it has fewer).
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace shadowc {

struct SelectArgs {
  const float* scores;
  const float* density;
  size_t batch, tail, layers, units, density_count;
  bool global;
  std::vector<uint8_t> exempt;  // one flag per layer
  size_t min_active;
  float* threshold;
  int32_t* active;
};

void SelectThreshold(const SelectArgs& args, const Parallel& parallel);

}  // namespace shadowc
