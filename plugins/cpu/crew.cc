// SPDX-License-Identifier: Apache-2.0
#include "crew.h"

#include <thread>

namespace shadowc {
namespace {

// Until `ready`; between looks the core's other thread may work, and after some 50 us whoever else wants it.
template <class F>
void Await(F&& ready) {
  constexpr int kLooks = 1000;
  for (int looks = 1; !ready(); ++looks) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
    if (looks % kLooks == 0) std::this_thread::yield();
  }
}

}  // namespace

void Crew::Section(size_t total, Parallel::Body body, void* closure) {
  Guarded guarded(body, closure);
  guarded_ = &guarded;
  done_.store(0, std::memory_order_relaxed);
  for (size_t s = 0; s < shares_; ++s) {
    share_[s].end = total * (s + 1) / shares_;
    // Whoever takes an index sees all that was written for it. Nobody is left from the section before: it
    // ended when its last index was done.
    share_[s].left.store(share_[s].end - total * s / shares_, std::memory_order_release);
  }
  section_.fetch_add(1, std::memory_order_release);
  TakePart(0);
  Await([&] { return done_.load(std::memory_order_acquire) == total; });
  guarded.Rethrow();
}

void Crew::Help() noexcept {
  const size_t member = 1 + helpers_.fetch_add(1, std::memory_order_relaxed);
  for (uint64_t seen = 0; seen != kOver;) {
    TakePart(member);
    Await([&] { return section_.load(std::memory_order_acquire) != seen; });
    seen = section_.load(std::memory_order_acquire);
  }
}

void Crew::TakePart(size_t member) noexcept {
  size_t ran = 0, index;
  for (size_t s = 0; s < shares_; ++s) {
    for (; Take((member + s) % shares_, &index); ++ran) Guarded::Run(guarded_, index);
  }
  if (ran != 0) done_.fetch_add(ran, std::memory_order_release);
}

bool Crew::Take(size_t share, size_t* index) noexcept {
  Share& from = share_[share];
  size_t left = from.left.load(std::memory_order_relaxed);
  while (left != 0) {
    if (!from.left.compare_exchange_weak(left, left - 1, std::memory_order_acquire,
                                         std::memory_order_relaxed))
      continue;
    *index = from.end - left;
    return true;
  }
  return false;
}

}  // namespace shadowc
