// SPDX-License-Identifier: Apache-2.0
// PredictUnits: the scores of one layer's units from what the layer reads, and the threshold that they must
// reach.
//
// Shapes: x [B, S, E]; w1 [P, E], w2 [N, P], of one type, float or int8, with a factor per row in scales1
// [P], scales2 [N]; int8: w2 is [ceil(N / 16), ceil(P / 4), 16, 4], weight 4 q + k of row 16 g + r at [g, q,
// r, k], the rest is zeros; b1 [P], b2 [N]; density [1 or B, K], of which column `column` counts. Y =
// max(tail, 1) tokens are scored, the last of each sequence: scores [B, tail, 1, N] = w2 . f(w1 . x + b1) +
// b2, with f = ReLU or nothing; last [B, 1, 1, N] are those of the last token, there even if the tail is
// empty. threshold and active [B, tail, 1] as SelectThreshold of one layer makes them (select_threshold.h);
// or `density` holds the thresholds themselves. A score does not depend on what is scored with it, nor on the
// number of threads.
#pragma once

#include "parallel.h"
#include "types.h"

namespace shadowc {

struct PredictArgs {
  const float* x;
  Norm norm;  // x is what it makes of x; nothing is added to a score
  size_t batch, tokens, width, tail;
  WeightType type;
  const void *w1, *w2;
  const float *scales1, *scales2, *b1, *b2;
  size_t hidden, units;
  bool relu;
  const float* density;
  bool is_threshold;  // what `density` holds
  size_t density_batch, densities, column;
  bool exempt;
  size_t min_active;
  float *scores, *threshold, *last;  // last: null if nobody asks
  int32_t* active;
};

void PredictUnits(const PredictArgs& args, const Parallel& parallel);

}  // namespace shadowc
