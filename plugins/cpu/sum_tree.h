// SPDX-License-Identifier: Apache-2.0
// Adding up partial sums in one fixed order, whoever finishes when.
//
// The order is a binary tree over the leaves 0 ... n - 1: neighbours first, then neighbours of those. The
// thread that finishes the second of two neighbours adds the second to the first, while both are still in a
// cache. So there is no second pass over cold sums by a single thread, and the result depends neither on
// timing nor on the number of threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

namespace shadowc {

// to[i] += add[i] for i < n.
void AddTo(float* to, const float* add, size_t n);

class SumTree {
 public:
  // leaves [count, size], written by the caller; leaf k has to be whole when Finish(k) is called.
  template <class SomeArena>
  SumTree(float* leaves, size_t count, size_t size, SomeArena* arena)
      : leaves_(leaves),
        count_(count),
        size_(size),
        arrived_(new (arena->template Take<std::atomic<uint8_t>>(2 * count))
                     std::atomic<uint8_t>[2 * count]{}) {}

  // Once for every leaf, or for every run of leaves (SumRuns below) whose sum is in the first of them. When
  // all have been called, leaf 0 holds the sum.
  void Finish(size_t leaf, size_t leaves = 1) {
    std::atomic<uint8_t>* level = arrived_;
    size_t node = leaf, width = 1;
    for (size_t nodes = count_; nodes > 1; nodes = (nodes + 1) / 2, node /= 2, width *= 2) {
      const size_t left = node & ~size_t{1};
      if (width >= leaves && left + 1 < nodes) {
        if (level[left / 2].fetch_add(1, std::memory_order_acq_rel) == 0) return;  // the neighbour adds
        AddTo(leaves_ + left * width * size_, leaves_ + (left + 1) * width * size_, size_);
      }
      level += (nodes + 1) / 2;
    }
  }

 private:
  float* leaves_;
  size_t count_, size_;
  std::atomic<uint8_t>* arrived_;  // of two neighbours, per pair, level after level
};

// The same sum by one thread, leaf after leaf: produce(k, to) sets to [size] to leaf k. `memory` holds
// SumDepth(count) * size floats; the sum ends in its first `size`.
inline size_t SumDepth(size_t count) {
  size_t depth = 1;
  for (size_t nodes = count; nodes > 1; nodes = (nodes + 1) / 2) ++depth;
  return depth;
}

template <class Produce>
void SumInOrder(size_t first, size_t width, size_t count, size_t size, float* memory,
                const Produce& produce) {
  if (width == 1) {
    produce(first, memory);
    return;
  }
  const size_t half = width / 2;
  SumInOrder(first, half, count, size, memory, produce);
  if (first + half >= count) return;
  SumInOrder(first + half, half, count, size, memory + size, produce);
  AddTo(memory, memory + size, size);
}

// The smallest power of two that is at least `count`: the width of the whole tree.
inline size_t TreeWidth(size_t count) {
  size_t width = 1;
  while (width < count) width *= 2;
  return width;
}

// Leaves in runs that one thread adds up by itself, in its own cache. A run is a whole subtree, so the sum is
// the same, bit for bit, however leaves are cut into runs. The host's pool cuts the runs into a range for
// each thread, and a thread that is done takes from the others' ranges: so there is a share of the leaves for
// each thread, in which long runs come first and single leaves last. A leaf of its own costs some 2 us, most
// of them for lines that the other core holds, and a long run at the end would leave the other threads idle.
class SumRuns {
 public:
  struct Run {
    size_t first, leaves;
  };

  template <class SomeArena>
  SumRuns(size_t leaves, size_t threads, SomeArena* arena) : runs_(arena->template Take<Run>(leaves)) {
    for (size_t t = 0; t < threads; ++t) {
      const size_t end = leaves * (t + 1) / threads;
      for (size_t first = leaves * t / threads; first < end;) {
        size_t length = 1;
        while (first % (2 * length) == 0 && 4 * length <= end - first) length *= 2;
        runs_[count_++] = {first, length};
        first += length;
      }
    }
  }

  size_t Count() const { return count_; }
  const Run& operator[](size_t i) const { return runs_[i]; }

 private:
  Run* runs_;
  size_t count_ = 0;
};

}  // namespace shadowc
