// SPDX-License-Identifier: Apache-2.0
// Host side: how rows are cut into chunks and tiles, and how the workspace is divided.
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace shadowc {

inline int cut(int size, int part) { return (size + part - 1) / part; }

// Rows first ... first + rows - 1 of batch * tokens, in tiles of `tile` rows (1, 4 or 16): the rows of a tile
// share each weight that is read.
struct Chunk {
  int first, rows, tile, tiles;
};

// Matrix rows of `width` elements begin at multiples of 16 bytes; others are read element by element.
inline bool is_wide(int width, int element_size) { return width % (16 / element_size) == 0; }

inline int tile_of(int rows, bool wide) {
  return !wide ? SHADOWC_TILE_ROWS : rows <= 1 ? 1 : rows <= 4 ? 4 : 16;
}

inline Chunk chunk_at(int first, int all_rows, bool wide) {
  const int rows = std::min(SHADOWC_CHUNK_ROWS, all_rows - first), tile = tile_of(rows, wide);
  return {first, rows, tile, cut(rows, tile)};
}

// Rows of the buffers of the largest chunk, in whole tiles: never fewer for more rows.
inline int padded_rows(int all_rows, bool wide) {
  const int rows = std::min(SHADOWC_CHUNK_ROWS, all_rows), tile = tile_of(rows, wide);
  return cut(rows, tile) * tile;
}

// Hands out aligned parts of the workspace; over a null pointer it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(size_t count) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;
  char* base_;
  size_t used_ = 0;
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// All of them given and aligned.
template <class... P>
bool usable(const P*... pointers) {
  return ((pointers != nullptr && aligned(pointers)) && ...);
}

inline bool fits_int(double value) { return value <= 2147483647.0; }

inline int check_mask(const shadowc_mask& mask, int batch, int tokens, int units) {
  if (mask.tail < 0 || mask.tail > tokens || mask.layers < 1) return SHADOWC_BAD_SIZE;
  if (mask.layer < 0 || mask.layer >= mask.layers || mask.units != units) return SHADOWC_BAD_SIZE;
  return mask.batch == 1 || mask.batch == batch ? SHADOWC_OK : SHADOWC_BAD_BATCH;
}

inline int check_types(shadowc_dtype act, shadowc_dtype weight) {
  if (act != SHADOWC_F32 && act != SHADOWC_F16 && act != SHADOWC_BF16) return SHADOWC_BAD_TYPE;
  return weight == act || weight == SHADOWC_I8 ? SHADOWC_OK : SHADOWC_BAD_TYPE;
}

}  // namespace shadowc
