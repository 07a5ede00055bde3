// SPDX-License-Identifier: Apache-2.0
#include "panels_x86.h"

#if HWY_ARCH_X86_64

#include "digits.h"

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {
namespace {

// Four rows side by side in the four lanes of a vector become 16 columns of 4 bytes.
struct Weaving {
  alignas(64) uint8_t index[64];
  constexpr Weaving() : index() {
    for (int c = 0; c < 16; ++c) {
      for (int r = 0; r < 4; ++r) index[4 * c + r] = static_cast<uint8_t>(16 * r + c);
    }
  }
};
constexpr Weaving kWeaving;

inline __m128i Columns(const int8_t* row, size_t c, __mmask16 some) {
  return row == nullptr ? _mm_setzero_si128() : _mm_maskz_loadu_epi8(some, row + c);
}

inline void FetchColumns(const WeightRow& row, size_t first, size_t columns, size_t per_byte) {
  if (row.values == nullptr) return;
  const std::byte* from = row.values + first / per_byte;
  for (size_t c = 0; c < columns / per_byte; c += 64) _mm_prefetch(from + c, _MM_HINT_T1);
}

template <bool kShift, bool kInt4>
void Weave(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven) {
  const __m512i index = _mm512_load_si512(kWeaving.index);
  const __m512i shift = kShift ? _mm512_set1_epi8(static_cast<char>(0x80)) : _mm512_setzero_si512();
  const size_t tiles = (columns + 31) / 32 * 2, count = steps * kPanelStep;
  alignas(64) int8_t room[4][kMostWovenBytes];
  for (size_t k = 0; k < count; k += 4) {
    const int8_t* row[4];
    for (size_t r = 0; r < 4; ++r) {
      const WeightRow& from = rows[k + r];
      if (k + r + kWeavesAhead < count) {
        FetchColumns(rows[k + r + kWeavesAhead], first, columns, kInt4 ? 2 : 1);
      }
      row[r] = from.values == nullptr ? nullptr : reinterpret_cast<const int8_t*>(from.values) + first;
      if (!kInt4 || from.values == nullptr) continue;
      UnpackInt4(from, first, columns, room[r]);
      row[r] = room[r];
    }
    for (size_t t = 0; t < tiles; ++t) {
      const size_t c = t * 16;
      const __mmask16 some = First(columns > c ? columns - c : 0);
      __m512i four = _mm512_castsi128_si512(Columns(row[0], c, some));
      four = _mm512_inserti32x4(four, Columns(row[1], c, some), 1);
      four = _mm512_inserti32x4(four, Columns(row[2], c, some), 2);
      four = _mm512_inserti32x4(four, Columns(row[3], c, some), 3);
      four = _mm512_xor_si512(_mm512_permutexvar_epi8(index, four), shift);
      _mm512_store_si512(woven + (t * steps + k / kPanelStep) * kPanelBlock + k % kPanelStep * 16, four);
    }
  }
}

template <bool kShift>
void WeaveRows(const WeightRows& weights, size_t steps, int8_t* woven) {
  const __m512i shift = kShift ? _mm512_set1_epi8(static_cast<char>(0x80)) : _mm512_setzero_si512();
  for (size_t s = 0; s < steps; ++s) {
    for (size_t half = 0; half < weights.halves; ++half) {
      const int8_t* from = weights.first + half * 16 * weights.stride + s * kPanelStep;
      int8_t* to = woven + (half * steps + s) * kPanelBlock;
      __m512i v[16];
      for (size_t n = 0; n < 16; ++n) v[n] = _mm512_loadu_si512(from + n * weights.stride);
      Transpose(v);
      for (size_t q = 0; q < 16; ++q) _mm512_store_si512(to + q * 64, _mm512_xor_si512(v[q], shift));
    }
  }
}

inline __m512 Values(const float* x, const float* factor, size_t i, size_t n) {
  const __mmask16 some = First(n - i);
  const __m512 v = _mm512_maskz_loadu_ps(some, x + i);
  return factor == nullptr ? v : _mm512_maskz_mul_ps(some, v, _mm512_maskz_loadu_ps(some, factor + i));
}

// Most rows of the last panel are often zeros, and would take as long as others to split.
void SplitZeros(const Panels& panels, size_t p, size_t r) {
  panels.step[p * kPanelRows + r] = 0.0f;
  int8_t* to = panels.Panel(p) + r * kPanelStep;
  for (size_t b = 0; b < panels.steps * panels.Places(p); ++b, to += kPanelBlock) {
    _mm512_store_si512(to, _mm512_setzero_si512());
  }
  for (size_t d = 0; d < kPanelDigits; ++d) panels.sums[(p * kPanelDigits + d) * kPanelRows + r] = 0;
}

}  // namespace

RowDigits MeasureRow(const float* x, const float* factor, size_t n, Rounding rounding) {
  if (x == nullptr) n = 0;
  // Bits of non-negative floats are ordered as the floats are, infinities and NaN last.
  __m512i most = _mm512_setzero_si512();
  __m512 squares = _mm512_setzero_ps();
  size_t some = 0;
  for (size_t i = 0; i < n; i += 16) {
    const __m512 v = Values(x, factor, i, n);
    most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(v)));
    if (rounding != Rounding::kFreely) continue;
    squares = _mm512_fmadd_ps(v, v, squares);
    some += static_cast<size_t>(_mm_popcnt_u32(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ)));
  }
  const float largest =
      _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epu32(most))));
  if (largest == 0.0f || !HasDigits(largest)) return {0.0f, 1, largest == 0.0f};
  if (rounding == Rounding::kNone) return {largest, kPanelDigits, true};
  if (rounding == Rounding::kFinely) return {largest, 2, true};
  // The rounding of a value is largest / 127 / sqrt(12), in root mean squares.
  constexpr float kMostRatio = 0.02f * 127.0f * 3.4641f;
  const float ratio2 = largest * largest * static_cast<float>(some) / _mm512_reduce_add_ps(squares);
  return {largest, static_cast<uint8_t>(ratio2 <= kMostRatio * kMostRatio ? 1 : 2), true};
}

void SplitRow(const float* x, const float* factor, size_t n, const RowDigits& digits, const Panels& panels,
              size_t p, size_t r) {
  // The largest integer of one, two and three digits, and what the place after the last digit is worth.
  static constexpr float kMost[] = {kMostOneDigit, kMostTwoDigits, kMostDigits};
  static constexpr float kPlace[] = {1.0f, 0x1p-8f, 0x1p-16f};
  const size_t places = panels.Places(p), own = digits.places, block = places * kPanelBlock;
  if (x == nullptr || digits.largest == 0.0f) return SplitZeros(panels, p, r);
  const float most = kMost[own - 1];
  panels.step[p * kPanelRows + r] = digits.largest / most * kPlace[places - own];
  const __m512 scale = _mm512_set1_ps(most / digits.largest);
  const __m512i half = _mm512_set1_epi32(128);
  int8_t* to = panels.Panel(p) + r * kPanelStep;
  __m512i sums[kPanelDigits] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (size_t i = 0; i < panels.steps * kPanelStep; i += 16) {
    const __m512 v = i < n ? Values(x, factor, i, n) : _mm512_setzero_ps();
    __m512i digit = _mm512_cvtps_epi32(_mm512_mul_ps(v, scale));
    int8_t* here = to + i / kPanelStep * block + i % kPanelStep;
    for (size_t d = own; d < places; ++d) {
      _mm_store_si128(reinterpret_cast<__m128i*>(here + d * kPanelBlock), _mm_setzero_si128());
    }
    for (size_t d = own; d-- > 0;) {
      const __m128i bytes = _mm512_cvtepi32_epi8(digit);
      _mm_store_si128(reinterpret_cast<__m128i*>(here + d * kPanelBlock), bytes);
      sums[d] = _mm512_add_epi32(sums[d], _mm512_cvtepi8_epi32(bytes));
      digit = _mm512_srai_epi32(_mm512_add_epi32(digit, half), 8);
    }
  }
  for (size_t d = 0; d < kPanelDigits; ++d) {
    panels.sums[(p * kPanelDigits + d) * kPanelRows + r] = _mm512_reduce_add_epi32(sums[d]);
  }
}

void TurnPanel(const Panels& panels, size_t p) {
  int8_t* block = panels.Panel(p);
  for (size_t b = 0; b < panels.steps * panels.Places(p); ++b, block += kPanelBlock) {
    __m512i v[16];
    for (size_t i = 0; i < 16; ++i) v[i] = _mm512_load_si512(block + i * 64);
    Transpose(v);
    for (size_t i = 0; i < 16; ++i) _mm512_store_si512(block + i * 64, v[i]);
  }
}

// The largest value of int4 becomes that of int8, in the group with the largest scale.
float FactorOfGroups(const float* scales, size_t groups) {
  // As in MeasureRow: a scale that is not finite is the largest, and spoils all of the row.
  __m512i most = _mm512_setzero_si512();
  for (size_t g = 0; g < groups; g += 16) {
    const __m512 some = _mm512_maskz_loadu_ps(First(groups - g), scales + g);
    most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(some)));
  }
  const __m512i all = _mm512_set1_epi32(static_cast<int>(_mm512_reduce_max_epu32(most)));
  return _mm512_cvtss_f32(_mm512_castsi512_ps(all)) * (kInt4Most / 127.0f);
}

// A group is 64 values of four bits, each of which is looked up in what the 16 there are become.
void UnpackInt4(const WeightRow& row, size_t first, size_t columns, int8_t* to) {
  static_assert(kInt4Group == 64);
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i low = _mm512_set1_epi8(15);
  for (size_t i = first; i < first + columns; i += kInt4Group, to += kInt4Group) {
    const __m512 scale = _mm512_set1_ps(row.scales[i / kInt4Group] / row.factor);
    const __m128i become = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(values, scale)));
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.values + i / 2));
    const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(become), _mm512_and_si512(halves, low));
    _mm512_storeu_si512(to, bytes);
  }
}

void WeaveSigned(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven) {
  Weave<false, false>(rows, steps, first, columns, woven);
}
void WeaveShifted(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven) {
  Weave<true, false>(rows, steps, first, columns, woven);
}
void WeaveInt4Signed(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven) {
  Weave<false, true>(rows, steps, first, columns, woven);
}
void WeaveInt4Shifted(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven) {
  Weave<true, true>(rows, steps, first, columns, woven);
}
void WeaveRowsShifted(const WeightRows& weights, size_t steps, int8_t* woven) {
  WeaveRows<true>(weights, steps, woven);
}
void WeaveRowsSigned(const WeightRows& weights, size_t steps, int8_t* woven) {
  WeaveRows<false>(weights, steps, woven);
}

}  // namespace shadowc
HWY_POP_ATTRIBUTES

#endif  // HWY_ARCH_X86_64
