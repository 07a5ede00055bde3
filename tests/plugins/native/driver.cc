// SPDX-License-Identifier: Apache-2.0
// kernel_driver: says on which SIMD level the kernels run, then answers calls (wire.h) on standard input
// until it ends. Attributes beyond the operator's own:
//   threads  of each caller's pool (2)
//   callers  that make this call at the same time, all on the same inputs; they have to agree to the bit (1)
//   twice    1: the pool runs every index on two threads, a planted race (0)
//   crew     1: the pool's threads form a crew, which runs the sections (0)
//   likely   how many threads the crew is told that there are (as many as threads)
//   throws   1: a section of the crew throws (0)
#include <cstdio>
#include <exception>
#include <iostream>
#include <stdexcept>

#include "crew.h"
#include "isa.h"
#include "operators.h"
#include "pool.h"

namespace {

// A crew's sections, spoilt: every index once more, in another thread's share, or an exception.
struct Spoilt {
  const shadowc::Parallel& crew;
  bool twice, throws;

  shadowc::Parallel Handle() {
    const auto run = [](void* self, size_t total, shadowc::Parallel::Body body, void* closure) {
      const Spoilt& spoilt = *static_cast<Spoilt*>(self);
      spoilt.crew.For(spoilt.twice ? 2 * total : total, [&](size_t i) {
        if (spoilt.throws && i + 1 == total) throw std::runtime_error("thrown in a section");
        body(closure, i % total);
      });
    };
    return shadowc::Parallel(run, this, crew.LikelyThreads());
  }
};

Tensors RunIn(Pool* pool, const Call& call) {
  const bool twice = call.Int("twice", 0) != 0;
  if (call.Int("crew", 0) == 0) return Run(call, pool->Handle());
  Tensors outputs;
  const size_t likely = static_cast<size_t>(call.Int("likely", call.Int("threads", 2)));
  shadowc::Crew::Run(pool->Handle(likely), [&](const shadowc::Parallel& crew) {
    outputs = Run(call, Spoilt{crew, twice, call.Int("throws", 0) != 0}.Handle());
  });
  return outputs;
}

Tensors RunAtOnce(const Call& call) {
  const size_t callers = static_cast<size_t>(call.Int("callers", 1));
  std::vector<Tensors> outputs(callers);
  std::vector<std::exception_ptr> problems(callers);
  std::vector<std::thread> threads;
  for (size_t c = 0; c < callers; ++c) {
    threads.emplace_back([&, c] {
      try {
        const bool twice = call.Int("twice", 0) != 0 && call.Int("crew", 0) == 0;
        Pool pool(static_cast<size_t>(call.Int("threads", 2)), twice);
        outputs[c] = RunIn(&pool, call);
      } catch (...) {
        problems[c] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& problem : problems) {
    if (problem) std::rethrow_exception(problem);
  }
  for (const Tensors& others : outputs) {
    for (const auto& [name, tensor] : others) {
      if (tensor.bytes != outputs[0][name].bytes)
        throw std::runtime_error("callers disagree on '" + name + "'");
    }
  }
  return outputs[0];
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  try {
    if (!shadowc::ApplyIsaLimit().empty()) throw std::runtime_error(shadowc::ApplyIsaLimit());
    std::cout << shadowc::ChosenIsa() << std::endl;
    for (Call call; ReadCall(std::cin, &call);) WriteTensors(std::cout, RunAtOnce(call));
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "kernel_driver: %s\n", problem.what());
    return 1;
  }
}
