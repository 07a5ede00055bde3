// SPDX-License-Identifier: Apache-2.0
// What the three kernels share. Letters: B batch, S new tokens, S' sparse tail, L predicted layers,
// N units (heads, or blocks of neurons) per layer, E hidden width.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/base.h"

namespace shadowc {

// Element type of the packed weights. A further type needs: a name here, a LoadWide in rows-inl.h, one line
// in DispatchWeights below and one in WeightTypeOf (ort_op.h).
enum class WeightType { kFloat32, kBFloat16, kInt8, kInt4 };

// Two weights of type int4, each stored as its value (-7 ... 7) plus 8. A row is cut into groups of
// kInt4Group values that share a scale; byte j of a group holds value j in its low half and value
// j + kInt4Group / 2 in its high half, so that a shift and an AND unpack whole registers.
struct Int4Pair {
  uint8_t both;
};
inline constexpr size_t kInt4Group = 64;
inline constexpr float kInt4Most = 7.0f;

template <class W>
inline constexpr bool kIsInt4 = std::is_same_v<W, Int4Pair>;

// What one record row of `width` weights is made of.
template <class W>
constexpr size_t RowElements(size_t width) {
  return kIsInt4<W> ? width / 2 : width;
}
template <class W>
constexpr size_t RowScales(size_t width) {
  return kIsInt4<W> ? width / kInt4Group : 1;
}
template <class W>
constexpr size_t RowBytes(size_t width) {
  return RowElements<W>(width) * sizeof(W) + RowScales<W>(width) * sizeof(float);
}

// Calls f with a null pointer of the element type.
template <class F>
void DispatchWeights(WeightType type, F&& f) {
  switch (type) {
    case WeightType::kFloat32:
      f(static_cast<const float*>(nullptr));
      return;
    case WeightType::kBFloat16:
      f(static_cast<const hwy::bfloat16_t*>(nullptr));
      return;
    case WeightType::kInt8:
      f(static_cast<const int8_t*>(nullptr));
      return;
    case WeightType::kInt4:
      f(static_cast<const Int4Pair*>(nullptr));
      return;
  }
}

// What one call really read of the weights (`w` and `scales`; nothing else). `records` counts neurons or
// heads of which at least one part was read. A record that serves several rows of one tile (kTileRows rows)
// counts once; if it is streamed again for the next tile it counts again.
struct ReadCount {
  int64_t records = 0;
  int64_t bytes = 0;

  ReadCount& operator+=(const ReadCount& other) {
    records += other.records;
    bytes += other.bytes;
    return *this;
  }
};

// Rows (tokens) that share one pass over the records: 32 rows of x and y at E = 2048 fill half of a 1 MiB L2,
// and one 32-bit word holds the rows of a unit. Re-streaming the weights per tile costs 6 % of a dense
// prefill.
inline constexpr size_t kTileRows = 32;

// Which units a row computes. Scores cover the last `tail` of `tokens` tokens, earlier tokens are dense.
// scores [scores_batch, tail, layers, units], threshold [threshold_batch, tail, layers]; a batch of 1 serves
// all rows. A unit is active iff !(score < threshold), so NaN on either side keeps it.
struct Selection {
  const float* scores = nullptr;
  const float* threshold = nullptr;
  size_t scores_batch = 1;
  size_t threshold_batch = 1;
  size_t tail = 0;
  size_t layers = 1;
  size_t units = 0;
  size_t layer = 0;
};

// What a row is selected by: null scores mean that it is dense.
struct RowSelection {
  const float* scores = nullptr;
  float threshold = 0.0f;
};
RowSelection SelectionOf(const Selection& selection, size_t tokens, size_t row);

// masks[u] gets bit r when row first_row + r computes unit u; `rows` <= kTileRows. Rows are numbered b * S +
// s.
void TileMasks(const Selection& selection, size_t tokens, size_t first_row, size_t rows, uint32_t* masks);

// Clears the bits of rows first_row ... of all units that are not wanted (null: none).
void KeepRows(const uint8_t* wanted, size_t first_row, size_t rows, uint32_t* masks, size_t units);

// The units with any bit set, ascending; returns how many.
size_t ActiveUnits(const uint32_t* masks, size_t units, uint32_t* list);

// Into how many parts (a power of two, at most `most`) to cut `bytes` of weights. Each has a partial sum that
// is added up apart: some 1 us at E = 2048. So a part is at least 256 KiB, 10 to 15 us of a core's bandwidth;
// fewer parts would leave larger machines idle.
size_t PiecesOf(size_t bytes, size_t most);

// How roughly many rows may meet weights (panels.h): not at all; as is good enough where no or few masks
// depend on the result; or so finely that the masks of all later layers hardly change.
enum class Rounding : uint8_t { kNone, kFreely, kFinely };

// How many digits rows and factors have where they meet int4 weights row by row; one is 8 bits, in steps of
// each group (int4-inl.h). Kernels that meet int4 with floats round nothing.
enum class Int4Digits : uint8_t { kThree, kOne };

// A layer norm in front of an operator, [E] each: the operator reads LayerNorm(x) and adds x to its result.
// Null: there is none, x is read as it is and not added.
struct Norm {
  const float* scale = nullptr;
  const float* bias = nullptr;
  float epsilon = 0.0f;
};

// y[r, :] = residual[r, :] + (bias + sum[r, :]), [rows, width]; a null residual is not added.
void WithBias(const float* bias, const float* residual, const float* sum, size_t rows, size_t width,
              float* y);

}  // namespace shadowc
