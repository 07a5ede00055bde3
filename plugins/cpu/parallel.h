// SPDX-License-Identifier: Apache-2.0
// The kernels' only view of threads: run body(0) ... body(total - 1) on whatever pool the host owns.
//
// Kernels cut their sums by the size of the work alone, never by the number of threads (the ONNX Runtime API
// does not even tell it), and combine them in one order; which thread computes how many of them is free
// (sum_tree.h). Results therefore depend neither on timing nor on the number of threads.
#pragma once

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <cstddef>
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

  Parallel(Run run, void* pool) : run_(run), pool_(pool) {}

  // How many threads there may be: the cores that this process may use. A guess; only speed may depend on it.
  static size_t LikelyThreads() {
    static const size_t threads = std::max(1u, UsableCores());
    return threads;
  }

  // Runs everything on the calling thread, in order.
  static Parallel Serial() {
    return Parallel(
        [](void*, size_t total, Body body, void* closure) {
          for (size_t i = 0; i < total; ++i) body(closure, i);
        },
        nullptr);
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
  Run run_;
  void* pool_;
};

}  // namespace shadowc
