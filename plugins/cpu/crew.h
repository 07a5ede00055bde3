// SPDX-License-Identifier: Apache-2.0
// Threads that stay together for a whole run of kernels, and are not called by the host's pool for each of
// its parallel sections.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace shadowc {

class Crew {
 public:
  // Calls work(handle) on one thread of the pool, once; the pool's other threads run sections of the handle,
  // and wait for the next one without giving up their core for long. Any of them may come late or not at all.
  // What work or a section throws first is thrown here.
  template <class F>
  static void Run(const Parallel& pool, F&& work) {
    Crew crew(pool.LikelyThreads());
    // How many threads there are is a guess: whoever is more helps too, and who comes late goes at once.
    pool.For(std::max(crew.members_, kMost), [&](size_t) {
      if (crew.led_.exchange(true)) {
        crew.Help();
        return;
      }
      const Leave leave{crew};
      work(crew.Handle());
    });
  }

 private:
  static constexpr size_t kMost = 16, kLine = 128;
  static constexpr uint64_t kOver = ~uint64_t{0};

  // Indices of a section that nobody has taken yet: the last `left` below `end`. Threads take from a share of
  // their own first, so that they seldom meet.
  struct alignas(kLine) Share {
    std::atomic<size_t> left{0};
    size_t end = 0;
  };
  // Lets the others go, however work ends.
  struct Leave {
    Crew& crew;
    ~Leave() { crew.section_.store(kOver, std::memory_order_release); }
  };

  explicit Crew(size_t members) : members_(members), shares_(members < kMost ? members : kMost) {}

  Parallel Handle() {
    return Parallel([](void* crew, size_t total, Parallel::Body body,
                       void* closure) { static_cast<Crew*>(crew)->Section(total, body, closure); },
                    this, members_);
  }
  void Section(size_t total, Parallel::Body body, void* closure);
  void Help() noexcept;
  void TakePart(size_t member) noexcept;
  bool Take(size_t share, size_t* index) noexcept;

  const size_t members_, shares_;
  std::atomic<bool> led_{false};
  std::atomic<size_t> helpers_{0};
  Guarded* guarded_ = nullptr;  // of the section that is open
  std::array<Share, kMost> share_;
  alignas(kLine) std::atomic<uint64_t> section_{0};  // its number
  alignas(kLine) std::atomic<size_t> done_{0};       // indices of it
};

}  // namespace shadowc
