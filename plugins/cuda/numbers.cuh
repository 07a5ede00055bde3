// SPDX-License-Identifier: Apache-2.0
// Element types as floats: loads of up to 16 bytes per instruction, and stores that round to nearest even.
#pragma once

#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace shadowc {

// Calls f with a null pointer of the element type.
template <class F>
int with_type(shadowc_dtype type, F&& f) {
  switch (type) {
    case SHADOWC_F32:
      return f(static_cast<float*>(nullptr));
    case SHADOWC_F16:
      return f(static_cast<__half*>(nullptr));
    case SHADOWC_BF16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case SHADOWC_I8:
      return f(static_cast<int8_t*>(nullptr));
  }
  return SHADOWC_BAD_TYPE;
}

inline int size_of(shadowc_dtype type) { return type == SHADOWC_F32 ? 4 : type == SHADOWC_I8 ? 1 : 2; }

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(int8_t value) { return static_cast<float>(value); }

template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// V consecutive elements as they lie in memory, held in registers. V > 1 needs V * sizeof(T) = 8 or a
// multiple of 16 bytes, and an address aligned to that (at most 16).
template <class T, int V>
struct Packed {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  using Word = std::conditional_t<kBytes % 16 == 0, uint4, uint2>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  static_assert(kWords * sizeof(Word) == kBytes);
  Word words[kWords];
};

template <class T>
struct Packed<T, 1> {
  T value;
};

// Weights pass through once: they should leave the caches first (evict-first loads).
template <class T, int V>
__device__ inline Packed<T, V> load_once(const T* from) {
  Packed<T, V> packed;
  if constexpr (V == 1) {
    packed.value = *from;
  } else {
    using Word = typename Packed<T, V>::Word;
#pragma unroll
    for (int i = 0; i < Packed<T, V>::kWords; ++i)
      packed.words[i] = __ldcs(reinterpret_cast<const Word*>(from) + i);
  }
  return packed;
}

template <class T, int V>
__device__ inline Packed<T, V> load(const T* from) {
  Packed<T, V> packed;
  if constexpr (V == 1) {
    packed.value = *from;
  } else {
    using Word = typename Packed<T, V>::Word;
#pragma unroll
    for (int i = 0; i < Packed<T, V>::kWords; ++i) packed.words[i] = reinterpret_cast<const Word*>(from)[i];
  }
  return packed;
}

template <class T, int V>
__device__ inline Packed<T, V> zeros() {
  Packed<T, V> packed;
  if constexpr (V == 1) {
    std::memset(&packed, 0, sizeof packed);
  } else {
#pragma unroll
    for (int i = 0; i < Packed<T, V>::kWords; ++i) packed.words[i] = {};
  }
  return packed;
}

// The elements of one 32-bit word, lowest address first.
template <class T>
__device__ inline void unpack_word(unsigned word, float* out);
template <>
__device__ inline void unpack_word<float>(unsigned word, float* out) {
  std::memcpy(out, &word, sizeof word);
}
template <>
__device__ inline void unpack_word<__half>(unsigned word, float* out) {
  __half2 pair;
  std::memcpy(static_cast<void*>(&pair), &word, sizeof word);
  const float2 both = __half22float2(pair);
  out[0] = both.x;
  out[1] = both.y;
}
template <>
__device__ inline void unpack_word<__nv_bfloat16>(unsigned word, float* out) {
  const unsigned low = word << 16, high = word & 0xffff0000u;  // a bfloat16 is the upper half of its float
  std::memcpy(out, &low, sizeof low);
  std::memcpy(out + 1, &high, sizeof high);
}
template <>
__device__ inline void unpack_word<int8_t>(unsigned word, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(static_cast<int8_t>(word >> (8 * i)));
}

template <class T, int V>
__device__ inline void unpack(const Packed<T, V>& packed, float (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = to_float(packed.value);
  } else {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < Packed<T, V>::kWords; ++i) {
      const auto& word = packed.words[i];
      float* to = out + i * kPerWord * static_cast<int>(sizeof(word) / 4);
      unpack_word<T>(word.x, to);
      unpack_word<T>(word.y, to + kPerWord);
      if constexpr (sizeof(word) == 16) {
        unpack_word<T>(word.z, to + 2 * kPerWord);
        unpack_word<T>(word.w, to + 3 * kPerWord);
      }
    }
  }
}

// The sum over a warp, in every lane.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

}  // namespace shadowc
