// SPDX-License-Identifier: Apache-2.0
#include "stream.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "stream.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target:
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace shadowc {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Sum of n words, n a multiple of 4 vectors, at an address that is a multiple of one; the sum keeps the
// compiler from dropping the loads.
uint64_t SumWords(const uint64_t* words, size_t n) {
  const hn::ScalableTag<uint64_t> d;
  const size_t lanes = hn::Lanes(d);
  auto a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0;
  for (size_t i = 0; i + 4 * lanes <= n; i += 4 * lanes) {
    a0 = hn::Add(a0, hn::Load(d, words + i));
    a1 = hn::Add(a1, hn::Load(d, words + i + lanes));
    a2 = hn::Add(a2, hn::Load(d, words + i + 2 * lanes));
    a3 = hn::Add(a3, hn::Load(d, words + i + 3 * lanes));
  }
  return hn::ReduceSum(d, hn::Add(hn::Add(a0, a1), hn::Add(a2, a3)));
}

}  // namespace HWY_NAMESPACE
}  // namespace shadowc
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shadowc {
namespace {

constexpr size_t kGrain = 4096;         // a page, and a multiple of 4 vectors on every target
constexpr size_t kLargePage = 1 << 21;  // what a limit for weights in large pages has to be measured with

struct FreeAligned {
  void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kLargePage}); }
};

HWY_EXPORT(SumWords);

// How much of `bytes` one thread reads.
size_t PartOf(size_t bytes, int threads, int repeats) {
  if (threads < 1 || repeats < 1) return 0;
  return bytes / static_cast<size_t>(threads) / kGrain * kGrain;
}

// `touch`: prepares each thread's part, before the first read.
template <class Touch>
double BestOf(const std::byte* memory, size_t part, int threads, int repeats, Touch touch) {
  const size_t count = static_cast<size_t>(threads);
  // Every thread takes its own times, between the gates: the thread that waits for them may be scheduled
  // late.
  using Clock = std::chrono::steady_clock;
  struct Span {
    Clock::time_point begin, end;
  };
  std::vector<Span> spans;
  try {
    spans.resize(count * static_cast<size_t>(repeats));
  } catch (const std::exception&) {
    return 0.0;
  }
  std::atomic<uint64_t> sink{0};
  std::barrier gate(threads);
  std::vector<std::thread> pool;
  const auto work = [&](size_t t) {
    const std::byte* mine = memory + t * part;
    touch(t);
    for (size_t r = 0; r < static_cast<size_t>(repeats); ++r) {
      gate.arrive_and_wait();
      const Clock::time_point begin = Clock::now();
      sink +=
          HWY_DYNAMIC_DISPATCH(SumWords)(reinterpret_cast<const uint64_t*>(mine), part / sizeof(uint64_t));
      spans[r * count + t] = {begin, Clock::now()};
    }
  };
  try {
    pool.reserve(count);
    for (size_t t = 0; t < count; ++t) pool.emplace_back(work, t);
  } catch (const std::exception&) {
    // The machine grants fewer threads: let those that run pass the gates, and report no measurement.
    for (size_t t = pool.size(); t < count; ++t) gate.arrive_and_drop();
  }
  for (std::thread& thread : pool) thread.join();
  if (pool.size() < count) return 0.0;
  double best = 0.0;
  for (auto row = spans.begin(); row != spans.end(); row += threads) {
    Span all = *row;
    for (auto span = row; span != row + threads; ++span) {
      all = {std::min(all.begin, span->begin), std::max(all.end, span->end)};
    }
    const double seconds = std::chrono::duration<double>(all.end - all.begin).count();
    best = std::max(best, static_cast<double>(part * count) / seconds);
  }
  return best;
}

}  // namespace

double StreamRead(size_t bytes, int threads, int repeats) {
  const size_t part = PartOf(bytes, threads, repeats),
               whole = part * static_cast<size_t>(std::max(threads, 0));
  if (part == 0) return 0.0;
  const std::unique_ptr<std::byte, FreeAligned> memory(
      static_cast<std::byte*>(::operator new(whole, std::align_val_t{kLargePage}, std::nothrow)));
  if (memory == nullptr) return 0.0;
#ifdef __linux__
  madvise(memory.get(), whole, MADV_HUGEPAGE);
#endif
  const auto fill = [&](size_t t) {
    std::fill_n(memory.get() + t * part, part, static_cast<std::byte>(t + 1));
  };
  return BestOf(memory.get(), part, threads, repeats, fill);
}

double StreamOver(const std::byte* memory, size_t bytes, int threads, int repeats) {
  const size_t part = PartOf(bytes, threads, repeats);
  if (part == 0 || reinterpret_cast<uintptr_t>(memory) % kGrain != 0) return 0.0;
  return BestOf(memory, part, threads, repeats, [](size_t) {});
}

}  // namespace shadowc
#endif  // HWY_ONCE
