// SPDX-License-Identifier: Apache-2.0
#include "round_trip.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <thread>

#include "parallel.h"

namespace shadowc {
namespace {

constexpr int kTrips = 500;  // in a series: some 100 us

// Waits until the ball is `mine`. Two threads on one core must not spin for a whole slice of time each.
void Await(const std::atomic<int>& ball, int mine) {
  constexpr int kSpins = 10000;
  for (int spins = 1; ball.load(std::memory_order_acquire) != mine; ++spins) {
    if (spins % kSpins == 0) std::this_thread::yield();
  }
}

}  // namespace

double RoundTrip(int repeats) {
  if (repeats < 1 || UsableCores() < 2) return 0.0;
  using Clock = std::chrono::steady_clock;
  alignas(128) std::atomic<int> ball{0};
  const auto play = [&](int mine) {
    for (int trip = 0; trip < kTrips; ++trip) {
      Await(ball, mine);
      ball.store(1 - mine, std::memory_order_release);
    }
  };
  double shortest = std::numeric_limits<double>::infinity();
  try {
    std::thread other([&] {
      for (int r = 0; r < repeats; ++r) play(1);
    });
    for (int r = 0; r < repeats; ++r) {
      const Clock::time_point begin = Clock::now();
      play(0);
      shortest = std::min(shortest, std::chrono::duration<double, std::nano>(Clock::now() - begin).count());
    }
    other.join();
  } catch (const std::exception&) {
    return 0.0;  // the thread was not granted
  }
  return shortest / kTrips;
}

}  // namespace shadowc
