// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA language when plugins/cuda/*.cu are compiled by a C++ compiler: every CUDA thread is
// a fiber with its own stack; a block runs until all of its threads are done, then the next. Threads switch
// only where they wait for each other: at shuffles and ballots (the 32 lanes of a warp) and at __syncthreads
// (the block).
//
// It finds: wrong results (also those that depend on the order of threads, in a second run with another
// order), waits that not all threads reach, lanes that have left before a shuffle, launches that no device
// would take, writes beyond an allocation, and, built with AddressSanitizer, reads beyond it or beyond shared
// memory. It does not find: races of two warps between the same two waits that happen to give the right
// result in both orders, anything about time, and what memory ordering between blocks would do (kernels here
// do not rely on any).
//
// One host thread at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulation {

enum class Wait { kNone, kWarp, kBlock, kDone };

struct Thread {
  void* stack = nullptr;  // where it continues
  Wait wait = Wait::kNone;
  int line = 0;            // of the source where it waits
  unsigned turn = 0;       // exchanges so far
  uint64_t slots[2] = {};  // what it shows to its warp: one slot is read while the other is written
  uint3 index = {};
};

struct State {
  dim3 grid, block;
  uint3 block_index = {};
  std::vector<Thread> threads;
  int current = 0;
};
extern State state;

// Runs a kernel; errors are kept for cudaGetLastError and shadowc_emulation_message.
void launch(const char* name, dim3 grid, dim3 block, const std::function<void()>& body);

// The current thread pauses until all that it waits for have come.
void wait_for(Wait what, int line);

// A shared array of one kernel, filled with a pattern before each block.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  void* data() const { return data_; }
  void poison() const { std::memset(data_, 0xA5, bytes_); }

 private:
  void* data_;
  size_t bytes_;
};

inline Thread& self() { return state.threads[state.current]; }
inline int lane() { return state.current % 32; }

// What `source` (a lane) shows at the same exchange.
template <class T>
T exchange(T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned slot = self().turn++ % 2;
  std::memcpy(&self().slots[slot], &value, sizeof value);
  wait_for(Wait::kWarp, line);
  T other;
  std::memcpy(&other, &state.threads[state.current - lane() + source].slots[slot], sizeof other);
  return other;
}

unsigned ballot(bool value, int line);
void require_all_lanes(unsigned mask, int line);

}  // namespace emulation

#define threadIdx (::emulation::self().index)
#define blockIdx (::emulation::state.block_index)
#define blockDim (::emulation::state.block)
#define gridDim (::emulation::state.grid)

#define SHADOWC_SHARED(type, name, count)                                 \
  static ::emulation::SharedMemory name##_memory((count) * sizeof(type)); \
  type* const name = static_cast<type*>(name##_memory.data())

#define SHADOWC_LAUNCH(kernel, grid, threads, stream, ...) \
  (static_cast<void>(stream), ::emulation::launch(#kernel, grid, threads, [=] { kernel(__VA_ARGS__); }))

inline void __syncthreads(int line = __builtin_LINE()) { emulation::wait_for(emulation::Wait::kBlock, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  emulation::require_all_lanes(mask, line);
  return emulation::exchange(value, source & 31, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int line = __builtin_LINE()) {
  emulation::require_all_lanes(mask, line);
  return emulation::exchange(value, (emulation::lane() ^ offset) & 31, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int offset, int line = __builtin_LINE()) {
  emulation::require_all_lanes(mask, line);
  const int source = emulation::lane() - offset;
  return emulation::exchange(value, source < 0 ? emulation::lane() : source, line);
}

inline unsigned __ballot_sync(unsigned mask, bool value, int line = __builtin_LINE()) {
  emulation::require_all_lanes(mask, line);
  return emulation::ballot(value, line);
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

template <class T>
T __ldcs(const T* from) {
  return *from;
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
