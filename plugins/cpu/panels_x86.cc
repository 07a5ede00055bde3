// SPDX-License-Identifier: Apache-2.0
#include "panels_x86.h"

#include "isa.h"

#if HWY_ARCH_X86_64

#include <algorithm>
#include <cstring>

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {
namespace {

inline void Fetch(const LaterRows& later, size_t step) {
  for (size_t i = 0; i < later.count; ++i) _mm_prefetch(later.rows[i] + step * kPanelStep, _MM_HINT_T1);
}

// ---- AMX

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void BeginAmx() {
  static constexpr TileShapes kShapes;
  _tile_loadconfig(&kShapes);
}

void EndAmx() { _tile_release(); }

void StoreTiles0(PanelSums* sums) {
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[0][2], 64);
}

void StoreTiles3(PanelSums* sums) {
  _tile_stored(3, sums[0][0], 64);
  _tile_stored(4, sums[0][1], 64);
  _tile_stored(5, sums[0][2], 64);
}

void ZeroTiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
}

// Six sums fill six of the eight tiles; one holds weights, one a digit, walked there and back so that the two
// halves share one load.
void DotsAmx(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
             PanelSums* sums) {
  const size_t stride = weights.stride;
  const int8_t *digit = panels.Panel(p), *first = weights.first, *second = first + 16 * stride;
  ZeroTiles();
  for (size_t s = 0; s < panels.steps; ++s, digit += kPanelDigits * kPanelBlock) {
    Fetch(later, s);
    _tile_loadd(6, first + s * kPanelStep, stride);
    _tile_loadd(7, digit, 64);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(7, digit + kPanelBlock, 64);
    _tile_dpbssd(1, 6, 7);
    _tile_loadd(7, digit + 2 * kPanelBlock, 64);
    _tile_dpbssd(2, 6, 7);
    if (weights.halves == 1) continue;
    _tile_loadd(6, second + s * kPanelStep, stride);
    _tile_dpbssd(5, 6, 7);
    _tile_loadd(7, digit + kPanelBlock, 64);
    _tile_dpbssd(4, 6, 7);
    _tile_loadd(7, digit, 64);
    _tile_dpbssd(3, 6, 7);
  }
  StoreTiles0(sums);
  if (weights.halves == 2) StoreTiles3(sums + 1);
}

void MixAmx(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  const int8_t *digit = panels.Panel(p), *second = woven + panels.steps * kPanelBlock;
  ZeroTiles();
  for (size_t s = 0; s < panels.steps; ++s, digit += kPanelDigits * kPanelBlock) {
    _tile_loadd(6, woven + s * kPanelBlock, 64);
    _tile_loadd(7, digit, 64);
    _tile_dpbssd(0, 7, 6);
    _tile_loadd(7, digit + kPanelBlock, 64);
    _tile_dpbssd(1, 7, 6);
    _tile_loadd(7, digit + 2 * kPanelBlock, 64);
    _tile_dpbssd(2, 7, 6);
    _tile_loadd(6, second + s * kPanelBlock, 64);
    _tile_dpbssd(5, 7, 6);
    _tile_loadd(7, digit + kPanelBlock, 64);
    _tile_dpbssd(4, 7, 6);
    _tile_loadd(7, digit, 64);
    _tile_dpbssd(3, 7, 6);
  }
  StoreTiles0(sums);
  StoreTiles3(sums + 1);
}

// ---- VNNI: unsigned times signed bytes. The weights are shifted by 128, and 128 times the sum of the digits
// is taken off again, at the start.

void BeginNothing() {}

void DotsVnni8(const int8_t* weights, size_t stride, const Panels& panels, size_t p, const LaterRows& later,
               PanelSums* sums, size_t first) {
  constexpr size_t kWeights = 8;
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i acc[kWeights][kPanelDigits];
  for (size_t d = 0; d < kPanelDigits; ++d) {
    const __m512i sum = _mm512_loadu_si512(panels.sums + (p * kPanelDigits + d) * kPanelRows);
    for (size_t n = 0; n < kWeights; ++n) {
      acc[n][d] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7));
    }
  }
  const int8_t* digit = panels.Panel(p);
  for (size_t s = 0; s < panels.steps; ++s, digit += kPanelDigits * kPanelBlock) {
    Fetch(later, s);
    for (size_t q = 0; q < kPanelStep; q += 4) {
      __m512i x[kPanelDigits];
      for (size_t d = 0; d < kPanelDigits; ++d) x[d] = _mm512_load_si512(digit + d * kPanelBlock + q * 16);
      for (size_t n = 0; n < kWeights; ++n) {
        int32_t quad;
        std::memcpy(&quad, weights + n * stride + s * kPanelStep + q, 4);
        const __m512i w = _mm512_xor_si512(_mm512_set1_epi32(quad), shift);
        for (size_t d = 0; d < kPanelDigits; ++d) acc[n][d] = _mm512_dpbusd_epi32(acc[n][d], w, x[d]);
      }
    }
  }
  HWY_UNROLL(8)
  for (size_t n = 0; n < kWeights; ++n) {
    HWY_UNROLL(3)
    for (size_t d = 0; d < kPanelDigits; ++d) _mm512_storeu_si512(sums[0][d][first + n], acc[n][d]);
  }
}

void DotsVnni(const WeightRows& weights, const Panels& panels, size_t p, const LaterRows& later,
              PanelSums* sums) {
  for (size_t n = 0; n < weights.halves * 16; n += 8) {
    DotsVnni8(weights.first + n * weights.stride, weights.stride, panels, p, n == 0 ? later : LaterRows{},
              sums + n / 16, n % 16);
  }
}

// The sums of a panel with fewer digits take the last planes, so that joining them means the same.
template <size_t kPlaces, size_t kRows>
void MixRows(const int8_t* digit, const int32_t* row_sums, const int8_t* woven, size_t steps, size_t r0,
             const LaterRows& later, PanelSums* sums) {
  __m512i acc[kRows][kPlaces][2];
  HWY_UNROLL(8)
  for (size_t r = 0; r < kRows; ++r) {
    HWY_UNROLL(3)
    for (size_t d = 0; d < kPlaces; ++d) {
      acc[r][d][0] = acc[r][d][1] = _mm512_set1_epi32(-128 * row_sums[d * kPanelRows + r0 + r]);
    }
  }
  digit += r0 * kPanelStep;
  for (size_t s = 0; s < steps; ++s, digit += kPlaces * kPanelBlock) {
    Fetch(later, s);
    const int8_t *w0 = woven + s * kPanelBlock, *w1 = w0 + steps * kPanelBlock;
    for (size_t q = 0; q < kPanelStep; q += 4) {
      const __m512i a = _mm512_load_si512(w0 + q * 16), b = _mm512_load_si512(w1 + q * 16);
      HWY_UNROLL(8)
      for (size_t r = 0; r < kRows; ++r) {
        HWY_UNROLL(3)
        for (size_t d = 0; d < kPlaces; ++d) {
          int32_t quad;
          std::memcpy(&quad, digit + d * kPanelBlock + r * kPanelStep + q, 4);
          const __m512i x = _mm512_set1_epi32(quad);
          acc[r][d][0] = _mm512_dpbusd_epi32(acc[r][d][0], a, x);
          acc[r][d][1] = _mm512_dpbusd_epi32(acc[r][d][1], b, x);
        }
      }
    }
  }
  HWY_UNROLL(8)
  for (size_t r = 0; r < kRows; ++r) {
    HWY_UNROLL(3)
    for (size_t d = 0; d < kPlaces; ++d) {
      const size_t plane = kPanelDigits - kPlaces + d;
      _mm512_store_si512(sums[0][plane][r0 + r], acc[r][d][0]);
      _mm512_store_si512(sums[1][plane][r0 + r], acc[r][d][1]);
    }
  }
}

template <size_t kPlaces, size_t kRows>
void MixPlaces(const Panels& panels, size_t p, const int8_t* woven, const LaterRows& later, PanelSums* sums) {
  const float* step = panels.step + p * kPanelRows;
  // The last panel is seldom full, and what the sums of a row of zeros are does not matter: they are times
  // step.
  size_t rows = kPanelRows;
  while (rows != 0 && step[rows - 1] == 0.0f) --rows;
  if (rows < kPanelRows || kPlaces < kPanelDigits) {
    const size_t all = kPanelDigits - (rows < kPanelRows ? 0 : kPlaces);
    std::memset(sums[0], 0, all * sizeof(sums[0][0])), std::memset(sums[1], 0, all * sizeof(sums[0][0]));
  }
  const auto mix = [&]<size_t kSome>(size_t r0) {
    MixRows<kPlaces, kSome>(panels.Panel(p), panels.sums + p * kPanelDigits * kPanelRows, woven, panels.steps,
                            r0, r0 == 0 ? later : LaterRows{}, sums);
  };
  for (size_t r0 = 0; r0 < rows; r0 += kRows) {
    if (2 * (rows - r0) <= kRows) {
      mix.template operator()<kRows / 2>(r0);
    } else {
      mix.template operator()<kRows>(r0);
    }
  }
}

void MixRowsVnni(const Panels& panels, size_t p, const int8_t* woven, const LaterRows& later,
                 PanelSums* sums) {
  switch (panels.Places(p)) {
    case 1:
      return MixPlaces<1, 8>(panels, p, woven, later, sums);
    case 2:
      return MixPlaces<2, 4>(panels, p, woven, later, sums);
    default:
      return MixPlaces<3, 4>(panels, p, woven, later, sums);
  }
}

void MixVnni(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  MixRowsVnni(panels, p, woven, LaterRows{}, sums);
}

// ---- from sums to floats

// The sum of one row's 16 x 16 planes as floats, without the step.
inline __m512 Joined(const PanelSums& sums, size_t i) {
  const __m512 base = _mm512_set1_ps(256.0f);
  __m512 v = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[0][i]));
  v = _mm512_fmadd_ps(v, base, _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[1][i])));
  return _mm512_fmadd_ps(v, base, _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[2][i])));
}

// values[n]: joined sums of weight row n times the steps of the panel's rows.
void StoreDots(__m512i* values, const DotsTarget& target) {
  const __m512 factor = _mm512_set1_ps(target.factor);
  for (size_t n = 0; n < kPanelRows; ++n) {
    if (n >= target.count) {
      values[n] = _mm512_setzero_si512();
      continue;
    }
    __m512 v = _mm512_castsi512_ps(values[n]);
    v = _mm512_fmadd_ps(v, _mm512_set1_ps(target.scale[n]), _mm512_set1_ps(target.bias[n]));
    v = _mm512_mul_ps(v, factor);
    if (target.relu) v = _mm512_max_ps(_mm512_setzero_ps(), v);  // in this order NaN stays
    if (target.mask != nullptr) v = _mm512_maskz_mov_ps(target.mask[n], v);
    if (target.fired != nullptr) target.fired[n] = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    values[n] = _mm512_castps_si512(v);
  }
  Transpose(values);
  const __mmask16 some = First(target.count);
  for (size_t r = 0; r < kPanelRows; ++r) {
    if (target.out[r] == nullptr) continue;
    const __m512 v = _mm512_castsi512_ps(values[r]);
    if (target.float16) {
      _mm256_mask_storeu_epi16(target.out[r], some,
                               _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      _mm512_mask_storeu_ps(target.out[r], some, v);
    }
  }
}

void FinishDots(const PanelSums& sums, const float* step, const DotsTarget& target) {
  const __m512 row_step = _mm512_loadu_ps(step);
  __m512i values[kPanelRows];
  for (size_t n = 0; n < kPanelRows; ++n) {
    values[n] = n < target.count ? _mm512_castps_si512(_mm512_mul_ps(Joined(sums, n), row_step))
                                 : _mm512_setzero_si512();
  }
  StoreDots(values, target);
}

void FinishWovenDots(const PanelSums& sums, const float* step, const DotsTarget& target) {
  __m512i values[kPanelRows];
  for (size_t r = 0; r < kPanelRows; ++r) {
    values[r] = _mm512_castps_si512(_mm512_mul_ps(Joined(sums, r), _mm512_set1_ps(step[r])));
  }
  Transpose(values);
  StoreDots(values, target);
}

void FinishMix(const PanelSums& sums, const float* step, const float* bias, size_t columns, float* const* y) {
  const __mmask16 some = First(columns);
  for (size_t r = 0; r < kPanelRows; ++r) {
    if (y[r] == nullptr) continue;
    const __m512 before = _mm512_maskz_loadu_ps(some, bias != nullptr ? bias : y[r]);
    const __m512 v = _mm512_fmadd_ps(Joined(sums, r), _mm512_set1_ps(step[r]), before);
    _mm512_mask_storeu_ps(y[r], some, v);
  }
}

}  // namespace
}  // namespace shadowc
HWY_POP_ATTRIBUTES

namespace shadowc {

const PanelKernels* ChosenPanelKernels() {
  // Measured at E = 2048: AMX needs as long for 2 rows as for 16, VNNI twice that.
  static constexpr PanelKernels kAmx{8,           BeginAmx,  EndAmx,  false,      MeasureRow,
                                     SplitRow,    TurnPanel, DotsAmx, FinishDots, FinishWovenDots,
                                     WeaveSigned, nullptr,   MixAmx,  nullptr,    FinishMix};
  static constexpr PanelKernels kVnni{16,         BeginNothing,    BeginNothing, true,
                                      MeasureRow, SplitRow,        TurnPanel,    DotsVnni,
                                      FinishDots, FinishWovenDots, WeaveShifted, WeaveRowsShifted,
                                      MixVnni,    MixRowsVnni,     FinishMix};
  return HasAmx() ? &kAmx : HasVnni() ? &kVnni : nullptr;
}

}  // namespace shadowc

#else

namespace shadowc {

const PanelKernels* ChosenPanelKernels() { return nullptr; }

}  // namespace shadowc

#endif  // HWY_ARCH_X86_64
