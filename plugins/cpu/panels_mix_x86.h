// SPDX-License-Identifier: Apache-2.0
// The loops that all products of x86 panels by row share, whatever their elements are, and what becomes of
// the sums.
#pragma once

#include "panels_x86.h"

#if HWY_ARCH_X86_64

#include <algorithm>
#include <cstring>

HWY_PUSH_ATTRIBUTES(SHADOWC_PANEL_TARGETS)
namespace shadowc {

inline void Fetch(const LaterRows& later, size_t step) {
  for (size_t i = 0; i < later.count; ++i) {
    _mm_prefetch(later.rows[i] + step * later.bytes, _MM_HINT_T1);
  }
}

// kRows rows of a panel times two columns of tiles. The sums of a panel with fewer digits take the last
// planes, so that joining them means the same.
template <class Product, size_t kPlaces, size_t kRows>
void MixRows(const int8_t* digit, const int32_t* row_sums, const int8_t* woven, size_t steps, size_t r0,
             const LaterRows& later, PanelSums* sums) {
  typename Product::Sum acc[kRows][kPlaces][2];
  HWY_UNROLL(8)
  for (size_t r = 0; r < kRows; ++r) {
    HWY_UNROLL(3)
    for (size_t d = 0; d < kPlaces; ++d) {
      acc[r][d][0] = acc[r][d][1] = Product::Start(row_sums[d * kPanelRows + r0 + r]);
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
          acc[r][d][0] = Product::Add(acc[r][d][0], a, x);
          acc[r][d][1] = Product::Add(acc[r][d][1], b, x);
        }
      }
    }
  }
  HWY_UNROLL(8)
  for (size_t r = 0; r < kRows; ++r) {
    HWY_UNROLL(3)
    for (size_t d = 0; d < kPlaces; ++d) {
      const size_t plane = kPanelDigits - kPlaces + d;
      _mm512_store_si512(sums[0][plane][r0 + r], Product::Bits(acc[r][d][0]));
      _mm512_store_si512(sums[1][plane][r0 + r], Product::Bits(acc[r][d][1]));
    }
  }
}

template <class Product, size_t kPlaces, size_t kRows>
void MixPlaces(const Panels& panels, size_t p, const int8_t* woven, const LaterRows& later, PanelSums* sums) {
  const size_t rows = panels.Rows(p);
  if (rows < kPanelRows) std::memset(sums, 0, 2 * sizeof(sums[0]));
  const auto mix = [&]<size_t kSome>(size_t r0) {
    MixRows<Product, kPlaces, kSome>(panels.Panel(p), panels.sums + p * kPanelDigits * kPanelRows, woven,
                                     panels.steps, r0, later.Share(r0, std::min(r0 + kRows, rows), rows),
                                     sums);
  };
  for (size_t r0 = 0; r0 < rows; r0 += kRows) {
    if (4 * (rows - r0) <= kRows) {
      mix.template operator()<kRows / 4>(r0);
    } else if (2 * (rows - r0) <= kRows) {
      mix.template operator()<kRows / 2>(r0);
    } else {
      mix.template operator()<kRows>(r0);
    }
  }
}

// ---- from sums to floats

// The sum of one row's 16 x 16 planes as floats, without the step; of `places` digits the last planes.
inline __m512 JoinedDigits(const PanelSums& sums, size_t i, size_t places) {
  const __m512 base = _mm512_set1_ps(256.0f);
  size_t d = kPanelDigits - places;
  __m512 v = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[d][i]));
  while (++d < kPanelDigits) v = _mm512_fmadd_ps(v, base, _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[d][i])));
  return v;
}

// The same of floats.
inline __m512 JoinedFloats(const PanelSums& sums, size_t i, size_t) {
  return _mm512_castsi512_ps(_mm512_loadu_si512(sums[kPanelDigits - 1][i]));
}

using Join = __m512 (*)(const PanelSums& sums, size_t i, size_t places);

// values[n]: joined sums of weight row n times the steps of the panel's rows.
inline void StoreDots(__m512i* values, const DotsTarget& target) {
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

template <Join joined>
void FinishDots(const PanelSums& sums, size_t places, const float* step, const DotsTarget& target) {
  const __m512 row_step = _mm512_loadu_ps(step);
  __m512i values[kPanelRows];
  for (size_t n = 0; n < kPanelRows; ++n) {
    values[n] = n < target.count ? _mm512_castps_si512(_mm512_mul_ps(joined(sums, n, places), row_step))
                                 : _mm512_setzero_si512();
  }
  StoreDots(values, target);
}

template <Join joined>
void FinishWovenDots(const PanelSums& sums, size_t places, const float* step, const DotsTarget& target) {
  __m512i values[kPanelRows];
  for (size_t r = 0; r < kPanelRows; ++r) {
    values[r] = _mm512_castps_si512(_mm512_mul_ps(joined(sums, r, places), _mm512_set1_ps(step[r])));
  }
  Transpose(values);
  StoreDots(values, target);
}

template <Join joined>
void FinishMix(const PanelSums& sums, size_t places, const float* step, const float* bias, size_t columns,
               float* const* y) {
  const __mmask16 some = First(columns);
  for (size_t r = 0; r < kPanelRows; ++r) {
    if (y[r] == nullptr) continue;
    const __m512 before = _mm512_maskz_loadu_ps(some, bias != nullptr ? bias : y[r]);
    const __m512 v = _mm512_fmadd_ps(joined(sums, r, places), _mm512_set1_ps(step[r]), before);
    _mm512_mask_storeu_ps(y[r], some, v);
  }
}

}  // namespace shadowc
HWY_POP_ATTRIBUTES

#endif  // HWY_ARCH_X86_64
