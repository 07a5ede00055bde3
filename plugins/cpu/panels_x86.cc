// SPDX-License-Identifier: Apache-2.0
// Intrinsics, not Highway: it has no tiles, and the layouts of a panel are those of AMX and of 512-bit
// vectors.
#include "panels.h"

#include "digits.h"
#include "hwy/base.h"
#include "isa.h"

#if HWY_ARCH_X86_64

#include <immintrin.h>

#include <cstring>

HWY_PUSH_ATTRIBUTES("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,fma,amx-tile,amx-int8")
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

void MixVnni(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  constexpr size_t kRows = 4;
  const int32_t* row_sums = panels.sums + p * kPanelDigits * kPanelRows;
  for (size_t r0 = 0; r0 < kPanelRows; r0 += kRows) {
    __m512i acc[kRows][kPanelDigits][2];
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t d = 0; d < kPanelDigits; ++d) {
        acc[r][d][0] = acc[r][d][1] = _mm512_set1_epi32(-128 * row_sums[d * kPanelRows + r0 + r]);
      }
    }
    const int8_t* digit = panels.Panel(p) + r0 * kPanelStep;
    for (size_t s = 0; s < panels.steps; ++s, digit += kPanelDigits * kPanelBlock) {
      const int8_t *w0 = woven + s * kPanelBlock, *w1 = w0 + panels.steps * kPanelBlock;
      for (size_t q = 0; q < kPanelStep; q += 4) {
        const __m512i a = _mm512_load_si512(w0 + q * 16), b = _mm512_load_si512(w1 + q * 16);
        for (size_t r = 0; r < kRows; ++r) {
          for (size_t d = 0; d < kPanelDigits; ++d) {
            int32_t quad;
            std::memcpy(&quad, digit + d * kPanelBlock + r * kPanelStep + q, 4);
            const __m512i x = _mm512_set1_epi32(quad);
            acc[r][d][0] = _mm512_dpbusd_epi32(acc[r][d][0], a, x);
            acc[r][d][1] = _mm512_dpbusd_epi32(acc[r][d][1], b, x);
          }
        }
      }
    }
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t d = 0; d < kPanelDigits; ++d) {
        _mm512_storeu_si512(sums[0][d][r0 + r], acc[r][d][0]);
        _mm512_storeu_si512(sums[1][d][r0 + r], acc[r][d][1]);
      }
    }
  }
}

// ---- weaving

inline __mmask16 First(size_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

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

template <bool kShift>
void Weave(const int8_t* const* rows, size_t steps, size_t columns, int8_t* woven) {
  constexpr size_t kAhead = 24;
  const __m512i index = _mm512_load_si512(kWeaving.index);
  const __m512i shift = kShift ? _mm512_set1_epi8(static_cast<char>(0x80)) : _mm512_setzero_si512();
  const size_t tiles = (columns + 31) / 32 * 2, count = steps * kPanelStep;
  for (size_t k = 0; k < count; k += 4) {
    const int8_t* row[4];
    for (size_t r = 0; r < 4; ++r) {
      row[r] = rows[k + r];
      const int8_t* later = k + r + kAhead < count ? rows[k + r + kAhead] : nullptr;
      for (size_t c = 0; later != nullptr && c < columns; c += 64) _mm_prefetch(later + c, _MM_HINT_T0);
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

// ---- between floats and digits

// v[i][j] becomes v[j][i].
inline void Transpose(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline __m512 Values(const float* x, const float* factor, size_t i, size_t n) {
  const __mmask16 some = First(n - i);
  const __m512 v = _mm512_maskz_loadu_ps(some, x + i);
  return factor == nullptr ? v : _mm512_maskz_mul_ps(some, v, _mm512_maskz_loadu_ps(some, factor + i));
}

// The sum of one row's 16 x 16 planes as floats, without the step.
inline __m512 Joined(const PanelSums& sums, size_t i) {
  const __m512 base = _mm512_set1_ps(256.0f);
  __m512 v = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[0][i]));
  v = _mm512_fmadd_ps(v, base, _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[1][i])));
  return _mm512_fmadd_ps(v, base, _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[2][i])));
}

bool SplitRow(const float* x, const float* factor, size_t n, const Panels& panels, size_t p, size_t r) {
  int8_t* to = panels.Panel(p) + r * kPanelStep;
  if (x == nullptr) n = 0;
  // Bits of non-negative floats are ordered as the floats are, infinities and NaN last.
  __m512i most = _mm512_setzero_si512();
  for (size_t i = 0; i < n; i += 16) {
    most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(Values(x, factor, i, n))));
  }
  const float largest =
      _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epu32(most))));
  const bool zero = largest == 0.0f, splits = zero || HasDigits(largest);
  if (zero || !splits) n = 0;
  panels.step[p * kPanelRows + r] = n == 0 ? 0.0f : largest / kMostDigits;
  const __m512 scale = _mm512_set1_ps(n == 0 ? 0.0f : kMostDigits / largest);
  const __m512i half = _mm512_set1_epi32(128);
  __m512i sums[kPanelDigits] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (size_t i = 0; i < panels.steps * kPanelStep; i += 16) {
    const __m512 v = i < n ? Values(x, factor, i, n) : _mm512_setzero_ps();
    const __m512i all = _mm512_cvtps_epi32(_mm512_mul_ps(v, scale));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(all, half), 8);
    const __m512i digit[kPanelDigits] = {_mm512_srai_epi32(_mm512_add_epi32(upper, half), 8), upper, all};
    for (size_t d = 0; d < kPanelDigits; ++d) {
      const __m128i bytes = _mm512_cvtepi32_epi8(digit[d]);
      _mm_store_si128(
          reinterpret_cast<__m128i*>(to + (i / kPanelStep * kPanelDigits + d) * kPanelBlock + i % kPanelStep),
          bytes);
      sums[d] = _mm512_add_epi32(sums[d], _mm512_cvtepi8_epi32(bytes));
    }
  }
  for (size_t d = 0; d < kPanelDigits; ++d) {
    panels.sums[(p * kPanelDigits + d) * kPanelRows + r] = _mm512_reduce_add_epi32(sums[d]);
  }
  return splits;
}

void TurnPanel(const Panels& panels, size_t p) {
  int8_t* block = panels.Panel(p);
  for (size_t b = 0; b < panels.steps * kPanelDigits; ++b, block += kPanelBlock) {
    __m512i v[16];
    for (size_t i = 0; i < 16; ++i) v[i] = _mm512_load_si512(block + i * 64);
    Transpose(v);
    for (size_t i = 0; i < 16; ++i) _mm512_store_si512(block + i * 64, v[i]);
  }
}

void FinishDots(const PanelSums& sums, const float* step, const DotsTarget& target) {
  const __m512 row_step = _mm512_loadu_ps(step), factor = _mm512_set1_ps(target.factor);
  __m512i values[kPanelRows];
  for (size_t n = 0; n < kPanelRows; ++n) {
    if (n >= target.count) {
      values[n] = _mm512_setzero_si512();
      continue;
    }
    __m512 v = _mm512_mul_ps(Joined(sums, n), row_step);
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
  static constexpr PanelKernels kAmx{8,       BeginAmx,   EndAmx,       SplitRow, TurnPanel,
                                     DotsAmx, FinishDots, Weave<false>, MixAmx,   FinishMix};
  static constexpr PanelKernels kVnni{16,       BeginNothing, BeginNothing, SplitRow, TurnPanel,
                                      DotsVnni, FinishDots,   Weave<true>,  MixVnni,  FinishMix};
  return HasAmx() ? &kAmx : HasVnni() ? &kVnni : nullptr;
}

}  // namespace shadowc

#else

namespace shadowc {

const PanelKernels* ChosenPanelKernels() { return nullptr; }

}  // namespace shadowc

#endif  // HWY_ARCH_X86_64
