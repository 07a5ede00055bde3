// SPDX-License-Identifier: Apache-2.0
// Panels of prompts for x86 without 8-bit dot products: weights and activations in 16 bits, multiplied in
// pairs (vpmaddwd), which is twice the products per instruction that floats are, and no conversion of weights
// to floats at every row.
//
// A row has one digit of 12 bits: sums of up to kMostElements products with 8-bit weights are exact in int32,
// whatever their order. Two digits, as calls that may not round need them, were no faster than floats: 1.16
// of their time for 16 rows, 0.97 to 0.98 for 64 to 256. An element has two bytes, so a step is 32 of each
// row; weights are widened when they are woven.
#include "panels_x86.h"

#if HWY_ARCH_X86_64

#include <algorithm>
#include <cstring>
#include <numeric>

#include "digits.h"

HWY_PUSH_ATTRIBUTES("avx2,fma,f16c")
namespace shadowc {
namespace {

constexpr float kMostIn12Bits = 2047.0f;
constexpr size_t kMostElements = 8192;
constexpr size_t kPlane = kPanelDigits - 1;  // of the sums: the last, of the only digit

void BeginNothing() {}

// The first n of 8 lanes.
inline __m256i First8(size_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<size_t>(n, 8))), lane);
}

inline __m256i Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void Store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline __m128i Load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void Store16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }

// ---- activations

inline __m256 Values(const float* x, const float* factor, size_t i, size_t n) {
  const __m256i some = First8(n - i);
  const __m256 v = _mm256_maskload_ps(x + i, some);
  return factor == nullptr ? v : _mm256_mul_ps(v, _mm256_maskload_ps(factor + i, some));
}

// The largest magnitude of x[i] * factor[i], i < n (factor null: 1).
inline float Largest(const float* x, const float* factor, size_t n) {
  // Bits of non-negative floats are ordered as the floats are, infinities and NaN last.
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i mosts = _mm256_setzero_si256();
  for (size_t i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_castps_si256(Values(x, factor, i, n));
    mosts = _mm256_max_epu32(mosts, _mm256_and_si256(bits, magnitude));
  }
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(mosts), _mm256_extracti128_si256(mosts, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(most));
}

// The mean magnitude of x[i] * factor[i], i < n, of those that are not 0: outliers count less in it than in a
// root mean square.
inline float MeanMagnitude(const float* x, const float* factor, size_t n) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 sums = _mm256_setzero_ps(), numbers = sums;
  for (size_t i = 0; i < n; i += 8) {
    const __m256 v = Values(x, factor, i, n);
    sums = _mm256_add_ps(sums, _mm256_and_ps(v, magnitude));
    const __m256 is_not_0 = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    numbers = _mm256_add_ps(numbers, _mm256_and_ps(is_not_0, _mm256_set1_ps(1.0f)));
  }
  alignas(32) float sum[8], number[8];
  _mm256_store_ps(sum, sums), _mm256_store_ps(number, numbers);
  return std::accumulate(sum, sum + 8, 0.0f) / std::accumulate(number, number + 8, 0.0f);
}

// What is freely rounded needs no more than 12 bits, whatever its outliers: they are rounded by largest /
// 2047 / sqrt(12), and the root mean square of kMostElements values is at least largest /
// sqrt(kMostElements). What is finely rounded has to stay below 0.4 % of the mean magnitude; other rows are
// left to floats.
RowDigits Measure(const float* x, const float* factor, size_t n, Rounding rounding) {
  if (x == nullptr) n = 0;
  const float largest = Largest(x, factor, n);
  if (!HasDigits(largest)) return {0.0f, 1, largest == 0.0f};
  if (rounding != Rounding::kFinely) return {largest, 1, true};
  constexpr float kMostRatio = 0.004f * kMostIn12Bits * 3.4641f;
  if (largest > kMostRatio * MeanMagnitude(x, factor, n)) return {0.0f, 1, false};
  return {largest, 1, true};
}

void Split(const float* x, const float* factor, size_t n, const RowDigits& digits, const Panels& panels,
           size_t p, size_t r) {
  if (x == nullptr || digits.largest == 0.0f) n = 0;
  panels.step[p * kPanelRows + r] = n == 0 ? 0.0f : digits.largest / kMostIn12Bits;
  const __m256 scale = _mm256_set1_ps(n == 0 ? 0.0f : kMostIn12Bits / digits.largest);
  constexpr size_t kElements = kPanelStep / 2;
  for (size_t i = 0; i < panels.steps * kElements; i += 8) {
    const __m256 v = i < n ? Values(x, factor, i, n) : _mm256_setzero_ps();
    const __m256i digit = _mm256_cvtps_epi32(_mm256_mul_ps(v, scale));
    int8_t* to = panels.Panel(p) + i / kElements * kPanelBlock + r * kPanelStep + i % kElements * 2;
    Store16(to, _mm_packs_epi32(_mm256_castsi256_si128(digit), _mm256_extracti128_si256(digit, 1)));
  }
}

// ---- weights

void Widen(const WeightRow& row, size_t first, size_t columns, int8_t* to) {
  const int8_t* from = reinterpret_cast<const int8_t*>(row.values) + first;
  size_t i = 0;
  for (; i + 16 <= columns; i += 16) Store(to + 2 * i, _mm256_cvtepi8_epi16(Load16(from + i)));
  for (; i < columns; ++i) {
    const int16_t wide = from[i];
    std::memcpy(to + 2 * i, &wide, 2);
  }
}

// As FactorOfGroups: the largest value of int4 becomes that of int8, in the group with the largest scale.
float Factor(const float* scales, size_t groups) {
  return Largest(scales, nullptr, groups) * (kInt4Most / 127.0f);
}

// A group is 64 values of four bits, each of which is looked up in what the 16 there are become.
void UnpackBytes(const WeightRow& row, size_t first, size_t columns, int8_t* to) {
  static_assert(kInt4Group == 64);
  const __m256 low_values = _mm256_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1);
  const __m256 high_values = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_set1_epi8(15);
  for (size_t i = first; i < first + columns; i += kInt4Group, to += kInt4Group) {
    const __m256 scale = _mm256_set1_ps(row.scales[i / kInt4Group] / row.factor);
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(low_values, scale));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(high_values, scale));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    const __m256i become = _mm256_broadcastsi128_si256(
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    const __m256i both = Load(row.values + i / 2);
    Store(to, _mm256_shuffle_epi8(become, _mm256_and_si256(both, low)));
    Store(to + 32, _mm256_shuffle_epi8(become, _mm256_and_si256(_mm256_srli_epi16(both, 4), low)));
  }
}

void UnpackWide(const WeightRow& row, size_t first, size_t columns, int8_t* to) {
  alignas(32) int8_t bytes[kInt4Group];
  for (size_t i = first; i < first + columns; i += kInt4Group, to += 2 * kInt4Group) {
    UnpackBytes(row, i, kInt4Group, bytes);
    for (size_t k = 0; k < kInt4Group; k += 16) Store(to + 2 * k, _mm256_cvtepi8_epi16(Load16(bytes + k)));
  }
}

inline __m128i Columns(const int8_t* row, size_t c, size_t some) {
  if (row == nullptr || some == 0) return _mm_setzero_si128();
  if (some >= 16) return Load16(row + c);
  alignas(16) int8_t rest[16] = {};
  std::memcpy(rest, row + c, some);
  return Load16(rest);
}

template <bool kInt4>
void Weave(const WeightRow* rows, size_t steps, size_t first, size_t columns, int8_t* woven) {
  const size_t tiles = (columns + 31) / 32 * 2, pairs = steps * kPanelStep / 4;
  alignas(32) int8_t room[2][kMostWovenBytes];
  for (size_t k = 0; k < pairs; ++k) {
    const int8_t* row[2];
    for (size_t r = 0; r < 2; ++r) {
      const size_t later = 2 * k + r + kWeavesAhead;
      if (later < 2 * pairs && rows[later].values != nullptr) {
        const std::byte* from = rows[later].values + first / (kInt4 ? 2 : 1);
        for (size_t c = 0; c < columns / (kInt4 ? 2 : 1); c += 64) _mm_prefetch(from + c, _MM_HINT_T1);
      }
      const WeightRow& from = rows[2 * k + r];
      row[r] = from.values == nullptr ? nullptr : reinterpret_cast<const int8_t*>(from.values) + first;
      if (!kInt4 || from.values == nullptr) continue;
      UnpackBytes(from, first, columns, room[r]);
      row[r] = room[r];
    }
    int8_t* to = woven + k / 16 * kPanelBlock + k % 16 * 64;
    for (size_t t = 0; t < tiles; ++t, to += steps * kPanelBlock) {
      const size_t c = t * 16, some = columns > c ? columns - c : 0;
      const __m128i a = Columns(row[0], c, some), b = Columns(row[1], c, some);
      Store(to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
      Store(to + 32, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)));
    }
  }
}

// v[i][j] becomes v[j][i].
inline void Transpose8(__m256i* v) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
  }
  std::copy(t, t + 8, v);
}

void WeaveRows(const WeightRows& weights, size_t steps, int8_t* woven) {
  for (size_t s = 0; s < steps; ++s) {
    for (size_t eight = 0; eight < 2 * weights.halves; ++eight) {
      const int8_t* from = weights.first + eight * 8 * weights.stride + s * kPanelStep;
      int8_t* to = woven + (eight / 2 * steps + s) * kPanelBlock + eight % 2 * 32;
      for (size_t side = 0; side < 2; ++side) {
        __m256i v[8];
        for (size_t n = 0; n < 8; ++n) v[n] = Load(from + n * weights.stride + side * 32);
        Transpose8(v);
        for (size_t q = 0; q < 8; ++q) Store(to + (side * 8 + q) * 64, v[q]);
      }
    }
  }
}

// ---- products

inline void Fetch(const LaterRows& later, size_t step) {
  for (size_t i = 0; i < later.count; ++i) {
    _mm_prefetch(later.rows[i] + step * later.bytes, _MM_HINT_T1);
  }
}

// Some steps of one tile of 16 columns, in which they and the panel's stay in L1.
struct Stretch {
  const int8_t* digits;  // of the panel's first of these steps
  const int8_t* woven;
  size_t steps;
  bool is_first;  // sums start at zero
};

// Adds kRows rows of a panel times a tile to their sums.
template <size_t kRows>
void MixRows(const Stretch& at, size_t r0, int32_t (*sums)[kPanelRows]) {
  __m256i acc[kRows][2];
  HWY_UNROLL(8)
  for (size_t r = 0; r < kRows; ++r) {
    acc[r][0] = at.is_first ? _mm256_setzero_si256() : Load(sums[r0 + r]);
    acc[r][1] = at.is_first ? _mm256_setzero_si256() : Load(sums[r0 + r] + 8);
  }
  const int8_t *digit = at.digits + r0 * kPanelStep, *w = at.woven;
  for (size_t s = 0; s < at.steps; ++s, digit += kPanelBlock, w += kPanelBlock) {
    for (size_t q = 0; q < kPanelStep; q += 4) {
      const __m256i a = Load(w + q * 16), b = Load(w + q * 16 + 32);
      HWY_UNROLL(8)
      for (size_t r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, digit + r * kPanelStep + q, 4);
        const __m256i x = _mm256_set1_epi32(pair);
        acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(a, x));
        acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(b, x));
      }
    }
  }
  HWY_UNROLL(8)
  for (size_t r = 0; r < kRows; ++r) Store(sums[r0 + r], acc[r][0]), Store(sums[r0 + r] + 8, acc[r][1]);
}

void MixWithLater(const Panels& panels, size_t p, const int8_t* woven, const LaterRows& later,
                  PanelSums* sums) {
  constexpr size_t kSteps = 8;
  const size_t rows = panels.Rows(p);
  for (size_t tile = 0; rows < kPanelRows && tile < 2; ++tile) {
    std::memset(sums[tile][kPlane], 0, sizeof(sums[tile][kPlane]));
  }
  for (size_t s = 0; s < panels.steps; s += kSteps) {
    const size_t steps = std::min(kSteps, panels.steps - s);
    for (size_t i = s; i < s + steps; ++i) Fetch(later, i);
    for (size_t tile = 0; tile < 2; ++tile) {
      const Stretch at{panels.Panel(p) + s * kPanelBlock, woven + (tile * panels.steps + s) * kPanelBlock,
                       steps, s == 0};
      size_t r0 = 0;
      const auto mix = [&]<size_t kRows>() {
        for (; r0 + kRows <= rows; r0 += kRows) MixRows<kRows>(at, r0, sums[tile][kPlane]);
      };
      mix.template operator()<6>();  // fills the registers
      mix.template operator()<4>();
      mix.template operator()<2>();
      mix.template operator()<1>();
    }
  }
}

void Mix(const Panels& panels, size_t p, const int8_t* woven, PanelSums* sums) {
  MixWithLater(panels, p, woven, LaterRows{}, sums);
}

// ---- from sums to floats

// Columns 8 * half ... of a row's sums as floats, times its step.
inline __m256 Joined(const PanelSums& sums, size_t r, size_t half, float step) {
  return _mm256_mul_ps(_mm256_cvtepi32_ps(Load(sums[kPlane][r] + 8 * half)), _mm256_set1_ps(step));
}

inline void StoreRow(void* out, bool float16, size_t half, size_t count, __m256 v) {
  const size_t some = std::min<size_t>(8, count - 8 * half);
  if (!float16) return _mm256_maskstore_ps(static_cast<float*>(out) + 8 * half, First8(some), v);
  const __m128i narrow = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(static_cast<uint16_t*>(out) + 8 * half, &narrow, 2 * some);
}

void FinishDots(const PanelSums& sums, size_t, const float* step, const DotsTarget& target) {
  alignas(32) uint16_t masks[16] = {}, fired[16];
  if (target.mask != nullptr) std::copy(target.mask, target.mask + target.count, masks);
  __m256i all_fired = _mm256_setzero_si256();
  const __m256 zero = _mm256_setzero_ps();
  for (size_t r = 0; r < kPanelRows; ++r) {
    const __m256i bit = _mm256_set1_epi16(static_cast<int16_t>(1u << r));
    const __m256i kept = _mm256_cmpeq_epi16(_mm256_and_si256(Load(masks), bit), bit);
    __m256i nonzero[2] = {};
    for (size_t half = 0; 8 * half < target.count; ++half) {
      const __m256i some = First8(target.count - 8 * half);
      const __m256 scale = _mm256_maskload_ps(target.scale + 8 * half, some);
      const __m256 bias = _mm256_maskload_ps(target.bias + 8 * half, some);
      __m256 v = _mm256_fmadd_ps(Joined(sums, r, half, step[r]), scale, bias);
      v = _mm256_mul_ps(v, _mm256_set1_ps(target.factor));
      if (target.relu) v = _mm256_max_ps(zero, v);  // in this order NaN stays
      if (target.mask != nullptr) {
        const __m128i these = half == 0 ? _mm256_castsi256_si128(kept) : _mm256_extracti128_si256(kept, 1);
        v = _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(these)));
      }
      nonzero[half] = _mm256_castps_si256(_mm256_cmp_ps(v, zero, _CMP_NEQ_UQ));
      if (target.out[r] != nullptr) StoreRow(target.out[r], target.float16, half, target.count, v);
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(nonzero[0], nonzero[1]), 0xd8);
    all_fired = _mm256_or_si256(all_fired, _mm256_and_si256(words, bit));
  }
  if (target.fired == nullptr) return;
  Store(fired, all_fired);
  std::copy(fired, fired + target.count, target.fired);
}

void FinishMix(const PanelSums& sums, size_t, const float* step, const float* bias, size_t columns,
               float* const* y) {
  for (size_t r = 0; r < kPanelRows; ++r) {
    if (y[r] == nullptr) continue;
    for (size_t half = 0; 8 * half < columns; ++half) {
      const __m256i some = First8(columns - 8 * half);
      const __m256 before = _mm256_maskload_ps((bias != nullptr ? bias : y[r]) + 8 * half, some);
      _mm256_maskstore_ps(y[r] + 8 * half, some, _mm256_add_ps(Joined(sums, r, half, step[r]), before));
    }
  }
}

}  // namespace
}  // namespace shadowc
HWY_POP_ATTRIBUTES

namespace shadowc {
namespace {

constexpr PanelKernels kInt8{
    .least_rows = 12,  // measured at E = 2048 beside row by row: 8 rows 1.21, 12 0.87, 33 0.71, 512 0.54
    .most_width = kMostElements,
    .element = 2,
    .digits = 1,
    .few = false,
    .factor = nullptr,
    .unpack = Widen,
    .begin = BeginNothing,
    .end = BeginNothing,
    .measure = Measure,
    .split = Split,
    .turn = nullptr,
    .dots = nullptr,
    .dots_two = nullptr,
    .finish_dots = nullptr,
    .finish_woven_dots = FinishDots,
    .weave = Weave<false>,
    .weave_rows = WeaveRows,
    .mix = Mix,
    .mix_two = nullptr,
    .mix_rows = MixWithLater,
    .finish_mix = FinishMix,
};

constexpr PanelKernels OfInt4(PanelKernels kernels) {
  kernels.factor = Factor;
  kernels.unpack = UnpackWide;
  kernels.weave = Weave<true>;
  return kernels;
}

}  // namespace

const PanelKernels* Avx2PanelKernels(WeightType type) {
  static constexpr PanelKernels kInt4 = OfInt4(kInt8);
  if (type == WeightType::kInt8) return &kInt8;
  return type == WeightType::kInt4 ? &kInt4 : nullptr;
}

}  // namespace shadowc

#endif  // HWY_ARCH_X86_64
