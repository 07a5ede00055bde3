// SPDX-License-Identifier: Apache-2.0
// The kernels' only view of threads: run body(0) ... body(total - 1) on whatever pool the host owns, or a
// crew of its threads (crew.h).
//
// Kernels cut their sums by the size of the work alone, never by the number of threads (the ONNX Runtime API
// does not even tell it), and combine them in one order; which thread computes how many of them is free
// (sum_tree.h). Results therefore depend neither on timing nor on the number of threads.
#pragma once

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <type_traits>

namespace shadowc {

inline unsigned UsableCores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return static_cast<unsigned>(CPU_COUNT(&set));
#endif
  return std::thread::hardware_concurrency();
}

class Parallel {
 public:
  using Body = void (*)(void* closure, size_t index);
  using Run = void (*)(void* pool, size_t total, Body body, void* closure);

  Parallel(Run run, void* pool, size_t likely_threads = Cores())
      : run_(run), pool_(pool), likely_threads_(likely_threads) {}

  // How many threads there may be. A guess where the host does not tell: the cores that this process may use.
  // Only speed may depend on it.
  size_t LikelyThreads() const { return likely_threads_; }

  // Runs everything on the calling thread, in order.
  static Parallel Serial() {
    return Parallel(
        [](void*, size_t total, Body body, void* closure) {
          for (size_t i = 0; i < total; ++i) body(closure, i);
        },
        nullptr, 1);
  }

  template <class F>
  void For(size_t total, F&& body) const {
    if (total == 0) return;
    if (total == 1) {
      body(size_t{0});
      return;
    }
    using Closure = std::remove_reference_t<F>;
    run_(pool_, total, [](void* closure, size_t index) { (*static_cast<Closure*>(closure))(index); }, &body);
  }

 private:
  static size_t Cores() {
    static const size_t cores = std::max(1u, UsableCores());
    return cores;
  }

  Run run_;
  void* pool_;
  size_t likely_threads_;
};

// A body whose exceptions stay inside, the first to be thrown when all is over: a pool may know none, and a
// worker that never reports back would hang the call.
class Guarded {
 public:
  Guarded(Parallel::Body body, void* closure) : body_(body), closure_(closure) {}

  // A Parallel::Body whose closure is a Guarded. After an exception it does nothing.
  static void Run(void* self, size_t index) noexcept {
    Guarded& guarded = *static_cast<Guarded*>(self);
    if (guarded.failed_.load(std::memory_order_relaxed)) return;
    try {
      guarded.body_(guarded.closure_, index);
    } catch (...) {
      if (!guarded.failed_.exchange(true)) guarded.first_ = std::current_exception();
    }
  }

  void Rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  const Parallel::Body body_;
  void* const closure_;
  std::atomic<bool> failed_{false};
  std::exception_ptr first_ = nullptr;
};

}  // namespace shadowc
