// SPDX-License-Identifier: Apache-2.0
#include "types.h"

#include <algorithm>

namespace shadowc {

RowSelection SelectionOf(const Selection& selection, size_t tokens, size_t row) {
  const size_t batch = row / tokens, token = row % tokens;
  if (token + selection.tail < tokens) return {};
  const size_t tail_row = token + selection.tail - tokens;
  const size_t score_row = (selection.scores_batch == 1 ? 0 : batch) * selection.tail + tail_row;
  const size_t threshold_row = (selection.threshold_batch == 1 ? 0 : batch) * selection.tail + tail_row;
  return {selection.scores + (score_row * selection.layers + selection.layer) * selection.units,
          selection.threshold[threshold_row * selection.layers + selection.layer]};
}

void TileMasks(const Selection& selection, size_t tokens, size_t first_row, size_t rows, uint32_t* masks) {
  const size_t units = selection.units;
  std::fill(masks, masks + units, 0u);
  uint32_t dense = 0;
  for (size_t r = 0; r < rows; ++r) {
    const RowSelection row = SelectionOf(selection, tokens, first_row + r);
    if (row.scores == nullptr) {
      dense |= 1u << r;
      continue;
    }
    for (size_t u = 0; u < units; ++u) {
      masks[u] |= static_cast<uint32_t>(!(row.scores[u] < row.threshold)) << r;
    }
  }
  if (dense != 0) {
    for (size_t u = 0; u < units; ++u) masks[u] |= dense;
  }
}

void KeepRows(const uint8_t* wanted, size_t first_row, size_t rows, uint32_t* masks, size_t units) {
  if (wanted == nullptr) return;
  uint32_t bits = 0;
  for (size_t r = 0; r < rows; ++r) bits |= uint32_t{wanted[first_row + r] != 0} << r;
  for (size_t u = 0; u < units; ++u) masks[u] &= bits;
}

size_t ActiveUnits(const uint32_t* masks, size_t units, uint32_t* list) {
  size_t count = 0;
  for (size_t u = 0; u < units; ++u) {
    list[count] = static_cast<uint32_t>(u);
    count += masks[u] != 0;
  }
  return count;
}

size_t PiecesOf(size_t bytes, size_t most) {
  constexpr size_t kLeast = size_t{256} << 10;
  size_t pieces = 1;
  while (pieces * 2 <= most && bytes >= pieces * 2 * kLeast) pieces *= 2;
  return pieces;
}

}  // namespace shadowc
