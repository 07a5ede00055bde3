// SPDX-License-Identifier: Apache-2.0
// Adding up partial sums in one fixed order, whoever finishes when.
//
// The order is a binary tree over the leaves 0 ... n - 1: neighbours first, then neighbours of those. The
// thread that finishes the second of two neighbours adds the second to the first, while both are still in a
// cache. So there is no second pass over cold sums by a single thread, and the result depends neither on
// timing nor on the number of threads.
//
// Leaves may have nothing to add: any(first, last) tells whether one of leaves first ... last - 1 has, and
// only such sums are ever written or read. It is the sum with zeros in their place, but for the sign of zero.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

namespace shadowc {

// to[i] += add[i] for i < n.
void AddTo(float* to, const float* add, size_t n);

struct AllLeaves {
  bool operator()(size_t, size_t) const { return true; }
};

class SumTree {
 public:
  template <class SomeArena>
  SumTree(size_t count, size_t size, SomeArena* arena)
      : sums_(arena->template Take<float*>(count)),
        count_(count),
        size_(size),
        arrived_(new (arena->template Take<std::atomic<uint8_t>>(2 * count))
                     std::atomic<uint8_t>[2 * count]{}) {}

  // Once for every leaf, or for every run of leaves (SumRuns below). `sum` [size] is theirs, whole if they
  // have something to add, and is the tree's from here on: sums stay where they are, so what one thread has
  // added up it finds in its own cache.
  template <class Any>
  void Finish(size_t leaf, size_t leaves, float* sum, const Any& any) {
    sums_[leaf] = sum;
    std::atomic<uint8_t>* level = arrived_;
    size_t node = leaf, width = 1;
    for (size_t nodes = count_; nodes > 1; nodes = (nodes + 1) / 2, node /= 2, width *= 2) {
      const size_t left = node & ~size_t{1};
      if (width >= leaves && left + 1 < nodes) {
        if (level[left / 2].fetch_add(1, std::memory_order_acq_rel) == 0) return;  // the neighbour adds
        Join(left * width, (left + 1) * width, std::min(count_, (left + 2) * width), any);
      }
      level += (nodes + 1) / 2;
    }
  }
  void Finish(size_t leaf, float* sum) { Finish(leaf, 1, sum, AllLeaves()); }

  // When all have been called: the sum [size], if any leaf had something to add.
  const float* Sum() const { return sums_[0]; }

 private:
  template <class Any>
  void Join(size_t left, size_t right, size_t end, const Any& any) {
    if (!any(right, end)) return;
    if (any(left, right)) {
      AddTo(sums_[left], sums_[right], size_);
    } else {
      sums_[left] = sums_[right];
    }
  }

  float** sums_;  // of the leaves from this one to where its neighbour's begin
  size_t count_, size_;
  std::atomic<uint8_t>* arrived_;  // of two neighbours, per pair, level after level
};

// The same sum by one thread, leaf after leaf: produce(k, y) sets y [size] to leaf k, if it has something to
// add. The sum ends in `to` [size]; `memory` holds SumDepth(count) * size floats.
inline size_t SumDepth(size_t count) {
  size_t depth = 0;
  for (size_t nodes = count; nodes > 1; nodes = (nodes + 1) / 2) ++depth;
  return depth;
}

template <class Any, class Produce>
void SumInOrder(size_t first, size_t width, size_t count, size_t size, float* to, float* memory,
                const Any& any, const Produce& produce) {
  if (width == 1) {
    produce(first, to);
    return;
  }
  const size_t middle = first + width / 2, end = std::min(first + width, count);
  SumInOrder(first, width / 2, count, size, to, memory, any, produce);
  if (middle >= end) return;
  if (!any(first, middle)) return SumInOrder(middle, width / 2, count, size, to, memory, any, produce);
  SumInOrder(middle, width / 2, count, size, memory, memory + size, any, produce);
  if (any(middle, end)) AddTo(to, memory, size);
}

// The smallest power of two that is at least `count`: the width of the whole tree.
inline size_t TreeWidth(size_t count) {
  size_t width = 1;
  while (width < count) width *= 2;
  return width;
}

// Leaves in runs that one thread adds up by itself, in its own cache. A run is a whole subtree, so the sum is
// the same, bit for bit, however leaves are cut into runs. Pool and crew cut the runs into a range of as
// many for each thread, and a thread that is done takes from the others' ranges: so there is a share of the
// work for each thread, in which long runs come first and single leaves last. A run of its own costs some
// 2 us, most of them for lines that the other core holds, and a long one at the end would leave the other
// threads idle.
class SumRuns {
 public:
  struct Run {
    size_t first, leaves;
    size_t next;  // the leaf that the thread will probably go on with; the number of all: there is none
  };

  // before [leaves + 1]: the work of all leaves in front of each; null: all are the same. Shares of fewer
  // runs than others end in runs of no leaves.
  template <class SomeArena>
  SumRuns(size_t leaves, size_t threads, const uint32_t* before, SomeArena* arena)
      : leaves_(leaves), before_(before) {
    size_t most = 0;
    for (size_t t = 0; t < threads; ++t) most = std::max(most, Cut(t, threads, nullptr));
    count_ = threads * most;
    runs_ = arena->template Take<Run>(count_);
    for (size_t t = 0; t < threads; ++t) {
      Run* share = runs_ + t * most;
      const size_t cut = Cut(t, threads, share);
      for (size_t r = 0; r + 1 < cut; ++r) share[r].next = share[r + 1].first;
      std::fill(share + cut, share + most, Run{0, 0, leaves});
    }
  }

  size_t Count() const { return count_; }
  const Run& operator[](size_t i) const { return runs_[i]; }

  // Sums [size] of the runs, each on pages of its own with one between them: a core whose prefetchers run on
  // from one sum into the next would keep taking its first lines away from the core that writes them
  // (measured: a fifth of the bandwidth).
  class Sums {
   public:
    template <class SomeArena>
    Sums(const SumRuns& runs, size_t size, SomeArena* arena)
        : stride_(((size * sizeof(float) + kPage - 1) / kPage + 1) * kPage) {
      const auto start =
          reinterpret_cast<uintptr_t>(arena->template Take<std::byte>(runs.Count() * stride_ + kPage));
      sums_ = reinterpret_cast<std::byte*>((start + kPage - 1) / kPage * kPage);
    }
    float* operator[](size_t run) const { return reinterpret_cast<float*>(sums_ + run * stride_); }

   private:
    static constexpr size_t kPage = 4096;
    size_t stride_;
    std::byte* sums_;
  };

 private:
  size_t Before(size_t leaf) const { return before_ == nullptr ? leaf : before_[leaf]; }
  size_t Work(size_t first, size_t last) const { return Before(last) - Before(first); }

  // The first leaf of a share.
  size_t Begin(size_t share, size_t threads) const {
    if (share == threads) return leaves_;
    if (before_ == nullptr) return leaves_ * share / threads;
    const size_t work = before_[leaves_] * share / threads;
    return static_cast<size_t>(std::lower_bound(before_, before_ + leaves_, work) - before_);
  }

  // The number of runs of a share, which are written to `to` if it is not null.
  size_t Cut(size_t share, size_t threads, Run* to) const {
    size_t count = 0;
    const size_t end = Begin(share + 1, threads);
    for (size_t first = Begin(share, threads); first < end; ++count) {
      size_t length = 1;
      while (first % (2 * length) == 0 && 2 * length <= end - first &&
             2 * Work(first, first + 2 * length) <= Work(first, end)) {
        length *= 2;
      }
      if (to != nullptr) to[count] = {first, length, leaves_};
      first += length;
    }
    return count;
  }

  size_t leaves_;
  const uint32_t* before_;
  Run* runs_ = nullptr;
  size_t count_ = 0;
};

}  // namespace shadowc
