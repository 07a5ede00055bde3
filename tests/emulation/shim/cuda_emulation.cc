// SPDX-License-Identifier: Apache-2.0
#include "cuda_emulation.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>

#include "fiber.h"

namespace emulation {

State state;

namespace {

[[maybe_unused]] constexpr size_t kGuard = 64;

#ifndef __SANITIZE_ADDRESS__
// Bytes around an allocation differ from place to place: one guard copied onto another is noticed.
unsigned char guard_byte(const unsigned char* place) {
  return static_cast<unsigned char>((reinterpret_cast<uintptr_t>(place) * 0x9E3779B97F4A7C15u) >> 56);
}
#endif

unsigned order_seed = 0;
cudaError_t last_error = cudaSuccess;
std::string message;

std::vector<SharedMemory*>& shared_arrays() {
  static std::vector<SharedMemory*> arrays;
  return arrays;
}

// 0 ... count - 1, shuffled unless the seed is 0. Shuffling is dear: a few permutations are made and drawn
// from.
class Orders {
 public:
  explicit Orders(int count) : permutations_(order_seed == 0 ? 1 : kPermutations, std::vector<int>(count)) {
    for (std::vector<int>& order : permutations_) {
      std::iota(order.begin(), order.end(), 0);
      if (order_seed != 0) std::shuffle(order.begin(), order.end(), random());
    }
  }

  const std::vector<int>& next() { return permutations_[turn_++ % permutations_.size()]; }

  static std::mt19937& random() {
    static std::mt19937 generator;
    return generator;
  }

 private:
  static constexpr int kPermutations = 13;
  std::vector<std::vector<int>> permutations_;
  size_t turn_ = 0;
};

void fail(cudaError_t error, const std::string& what) {
  if (last_error != cudaSuccess) return;
  last_error = error;
  message = what;
}

// Runs blocks of one kernel, all of one size.
class Block {
 public:
  Block(const char* name, int threads) : name_(name), threads_(threads), warps_(cut_warps()), lanes_(32) {}

  bool run() {
    for (SharedMemory* array : shared_arrays()) array->poison();
    done_ = 0;
    while (true) {
      const int before = done_;
      bool moved = false;
      for (const int warp : warps_.next()) {
        bool again = run_warp(warp, &moved);
        while (again && order_seed == 0) again = run_warp(warp, &moved);
        if (!error_.empty()) return report();
      }
      if (done_ == threads_) return true;
      if (!moved && done_ == before && !release_block()) return report();
    }
  }

 private:
  int cut_warps() const { return (threads_ + 31) / 32; }

  // Lets the lanes run up to where they wait; true if that was for each other only, and all are there. *moved
  // is set if any lane ran.
  bool run_warp(int warp, bool* moved) {
    const int begin = warp * 32, lanes = std::min(32, threads_ - begin);
    for (const int lane : lanes_.next()) {
      if (lane >= lanes || state.threads[begin + lane].wait != Wait::kNone) continue;
      state.current = begin + lane;
      *moved = true;
      resume(state.current, &self().stack);
      done_ += self().wait == Wait::kDone;
    }
    Thread* const first = &state.threads[begin];
    int waiting = 0;
    for (int i = 0; i < lanes; ++i) waiting += first[i].wait == Wait::kWarp;
    if (waiting == 0) return false;
    if (waiting != lanes) return not_together(first, lanes);
    for (int i = 0; i < lanes; ++i) {
      if (first[i].line != first->line) return wrong("lanes wait in lines ", first->line, first[i].line);
      first[i].wait = Wait::kNone;
    }
    return true;
  }

  // Some lanes wait for all, and others will not come.
  bool not_together(const Thread* first, int lanes) {
    const auto is = [](Wait wait) { return [wait](const Thread& t) { return t.wait == wait; }; };
    const int line = std::find_if(first, first + lanes, is(Wait::kWarp))->line;
    const bool left = std::any_of(first, first + lanes, is(Wait::kDone));
    return wrong(
        left ? "lanes have left before the exchange in line " : "not all lanes reach the exchange in line ",
        line);
  }

  // Ends a __syncthreads that all threads have reached.
  bool release_block() {
    const int line = state.threads[0].line;
    for (Thread& thread : state.threads) {
      if (thread.wait != Wait::kBlock)
        return wrong("not all threads reach the __syncthreads of line ", any_line());
      if (thread.line != line) return wrong("threads wait at __syncthreads of lines ", line, thread.line);
    }
    for (Thread& thread : state.threads) thread.wait = Wait::kNone;
    return true;
  }

  int any_line() const {
    const auto waits = [](const Thread& t) { return t.wait == Wait::kBlock; };
    return std::find_if(state.threads.begin(), state.threads.end(), waits)->line;
  }

  bool wrong(const char* what, int line, int other = 0) {
    error_ = what + std::to_string(line) + (other != 0 ? " and " + std::to_string(other) : "");
    return false;
  }

  bool report() {
    const uint3 b = state.block_index;
    fail(cudaErrorLaunchFailure, std::string(name_) + ", block " + std::to_string(b.x) + " " +
                                     std::to_string(b.y) + " " + std::to_string(b.z) + ": " + error_);
    return false;
  }

  const char* name_;
  int threads_;
  Orders warps_, lanes_;
  int done_ = 0;
  std::string error_;
};

bool can_launch(const dim3& grid, const dim3& block) {
  const auto inside = [](unsigned size, unsigned most) { return size >= 1 && size <= most; };
  return inside(grid.x, 2147483647u) && inside(grid.y, 65535u) && inside(grid.z, 65535u) &&
         inside(block.x, 1024u) && block.y == 1 && block.z == 1;
}

}  // namespace

SharedMemory::SharedMemory(size_t bytes) : data_(std::malloc(bytes)), bytes_(bytes) {
  shared_arrays().push_back(this);
  poison();
}

void wait_for(Wait what, int line) {
  self().wait = what;
  self().line = line;
  pause(&self().stack);
}

unsigned ballot(bool value, int line) {
  const unsigned slot = self().turn % 2;
  exchange(value, lane(), line);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    bits |= static_cast<unsigned>(state.threads[state.current - lane() + i].slots[slot] & 1) << i;
  return bits;
}

void require_all_lanes(unsigned mask, int line) {
  if (mask == 0xffffffffu) return;
  fail(cudaErrorLaunchFailure, "an exchange without all lanes in line " + std::to_string(line));
}

void launch(const char* name, dim3 grid, dim3 block, const std::function<void()>& body) {
  if (last_error != cudaSuccess) return;
  if (!can_launch(grid, block)) {
    fail(cudaErrorInvalidConfiguration, std::string(name) + ": no device takes this grid or block");
    return;
  }
  Orders::random().seed(order_seed);
  state.grid = grid;
  state.block = block;
  Orders blocks(static_cast<int>(grid.x * grid.y * grid.z));
  Block runner(name, static_cast<int>(block.x));
  for (const int i : blocks.next()) {
    state.block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    state.threads.assign(block.x, Thread());
    for (unsigned t = 0; t < block.x; ++t) {
      state.threads[t].index = {t, 0, 0};
      prepare(
          static_cast<int>(t), &state.threads[t].stack,
          [](const void* run) {
            (*static_cast<const std::function<void()>*>(run))();
            wait_for(Wait::kDone, 0);
          },
          &body);
    }
    if (!runner.run()) return;
  }
}

}  // namespace emulation

// ---- what the CUDA runtime would do

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulation::message.c_str();
}

// ---- for the tests

extern "C" {

// 0: threads run in their order; else in one that the seed gives.
void shadowc_emulation_order(unsigned seed) { emulation::order_seed = seed; }

// Device memory: 16-byte aligned, filled with a pattern, guarded behind its end (by AddressSanitizer if that
// is there).
void* shadowc_emulation_allocate(size_t bytes) {
  void* memory = nullptr;
#ifdef __SANITIZE_ADDRESS__
  if (posix_memalign(&memory, 16, std::max<size_t>(bytes, 1)) != 0) return nullptr;
  std::memset(memory, 0xA5, bytes);
  return memory;
#else
  if (posix_memalign(&memory, emulation::kGuard, bytes + 2 * emulation::kGuard) != 0) return nullptr;
  unsigned char* guarded = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < emulation::kGuard; ++i) {
    guarded[i] = emulation::guard_byte(guarded + i);
    unsigned char* behind = guarded + emulation::kGuard + bytes + i;
    *behind = emulation::guard_byte(behind);
  }
  unsigned char* begin = guarded + emulation::kGuard;
  std::memset(begin, 0xA5, bytes);
  return begin;
#endif
}

// Returns 1 if the bytes around the memory are as they were.
int shadowc_emulation_release(void* memory, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  static_cast<void>(bytes);
  std::free(memory);
  return 1;
#else
  unsigned char* begin = static_cast<unsigned char*>(memory);
  const auto intact = [](const unsigned char* guard) {
    for (const unsigned char* c = guard; c < guard + emulation::kGuard; ++c) {
      if (*c != emulation::guard_byte(c)) return false;
    }
    return true;
  };
  const bool whole = intact(begin - emulation::kGuard) && intact(begin + bytes);
  std::free(begin - emulation::kGuard);
  return whole;
#endif
}
}
