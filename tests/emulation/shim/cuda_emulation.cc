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

constexpr size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0x5E;

unsigned order_seed = 0;
cudaError_t last_error = cudaSuccess;
std::string message;

std::vector<SharedMemory*>& shared_arrays() {
  static std::vector<SharedMemory*> arrays;
  return arrays;
}

// 0 ... count - 1, shuffled unless the seed is 0.
std::vector<int> order_of(size_t count, std::mt19937* random) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed != 0) std::shuffle(order.begin(), order.end(), *random);
  return order;
}

void fail(cudaError_t error, const std::string& what) {
  if (last_error != cudaSuccess) return;
  last_error = error;
  message = what;
}

// The threads of one block.
class Block {
 public:
  Block(const char* name, std::mt19937* random) : name_(name), random_(random) {}

  bool run() {
    for (SharedMemory* array : shared_arrays()) array->poison();
    const int warps = (size() + 31) / 32;
    while (true) {
      for (const int warp : order_of(warps, random_)) {
        while (run_warp(warp) && order_seed == 0) {
        }
        if (!error_.empty()) return report();
      }
      if (all(Wait::kDone)) return true;
      if (!any(Wait::kNone) && !release_block()) return report();
    }
  }

 private:
  int size() const { return static_cast<int>(state.threads.size()); }
  bool any(Wait wait) const {
    return std::any_of(state.threads.begin(), state.threads.end(), [&](const Thread& t) { return t.wait == wait; });
  }
  bool all(Wait wait) const {
    return std::all_of(state.threads.begin(), state.threads.end(), [&](const Thread& t) { return t.wait == wait; });
  }

  // Lets the lanes run up to where they wait; true if that was for each other only, and all are there.
  bool run_warp(int warp) {
    const int begin = warp * 32, lanes = std::min(32, size() - begin);
    for (const int lane : order_of(lanes, random_)) {
      state.current = begin + lane;
      if (self().wait == Wait::kNone) resume(state.current, &self().stack);
    }
    int waiting = 0, left = 0;
    const Thread* first = nullptr;
    for (int i = begin; i < begin + lanes; ++i) {
      const Thread& thread = state.threads[i];
      left += thread.wait == Wait::kDone;
      if (thread.wait != Wait::kWarp) continue;
      ++waiting;
      if (first == nullptr) first = &thread;
      if (thread.line != first->line) return wrong("lanes wait in lines ", first->line, thread.line);
    }
    if (waiting == 0) return false;
    if (left != 0) return wrong("lanes have left before the exchange in line ", first->line);
    if (waiting != lanes) return wrong("not all lanes reach the exchange in line ", first->line);
    for (int i = begin; i < begin + lanes; ++i) state.threads[i].wait = Wait::kNone;
    return true;
  }

  // Ends a __syncthreads that all threads have reached.
  bool release_block() {
    const int line = state.threads[0].line;
    for (Thread& thread : state.threads) {
      if (thread.wait != Wait::kBlock) return wrong("not all threads reach the __syncthreads of line ", any_line());
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
    fail(cudaErrorLaunchFailure, std::string(name_) + ", block " + std::to_string(b.x) + " " + std::to_string(b.y) +
                                     " " + std::to_string(b.z) + ": " + error_);
    return false;
  }

  const char* name_;
  std::mt19937* random_;
  std::string error_;
};

bool can_launch(const dim3& grid, const dim3& block) {
  const auto inside = [](unsigned size, unsigned most) { return size >= 1 && size <= most; };
  return inside(grid.x, 2147483647u) && inside(grid.y, 65535u) && inside(grid.z, 65535u) && inside(block.x, 1024u) &&
         block.y == 1 && block.z == 1;
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
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(state.threads[state.current - lane() + i].slots[slot] & 1)
                                       << i;
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
  std::mt19937 random(order_seed);
  state.grid = grid;
  state.block = block;
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  for (const int i : order_of(blocks, &random)) {
    state.block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    state.threads.assign(block.x, Thread());
    for (unsigned t = 0; t < block.x; ++t) {
      state.threads[t].index = {t, 0, 0};
      prepare(static_cast<int>(t), &state.threads[t].stack, [](const void* run) {
        (*static_cast<const std::function<void()>*>(run))();
        wait_for(Wait::kDone, 0);
      }, &body);
    }
    if (!Block(name, &random).run()) return;
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

// Device memory: 16-byte aligned, filled with a pattern, guarded behind its end (by AddressSanitizer if that is there).
void* shadowc_emulation_allocate(size_t bytes) {
  void* memory = nullptr;
#ifdef __SANITIZE_ADDRESS__
  if (posix_memalign(&memory, 16, std::max<size_t>(bytes, 1)) != 0) return nullptr;
  std::memset(memory, 0xA5, bytes);
  return memory;
#else
  if (posix_memalign(&memory, emulation::kGuard, bytes + 2 * emulation::kGuard) != 0) return nullptr;
  char* begin = static_cast<char*>(memory) + emulation::kGuard;
  std::memset(memory, emulation::kGuardByte, bytes + 2 * emulation::kGuard);
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
    return std::all_of(guard, guard + emulation::kGuard, [](unsigned char c) { return c == emulation::kGuardByte; });
  };
  const bool whole = intact(begin - emulation::kGuard) && intact(begin + bytes);
  std::free(begin - emulation::kGuard);
  return whole;
#endif
}
}
