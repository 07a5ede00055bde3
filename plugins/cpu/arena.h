// SPDX-License-Identifier: Apache-2.0
// Scratch memory without allocations in the steady state: a bump arena that grows once and is then reused.
//
// A call takes an arena from one process-wide pool (CallArena), so that the layers of a model, which run one
// after the other, share one cache-warm block, and concurrent calls of one kernel never share. Code inside a
// parallel body uses ThreadArena() of the thread that runs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace shadowc {

class Arena {
 public:
  static constexpr size_t kAlign =
      128;  // no two blocks share a cache line, or the pair that prefetchers fetch

  template <class T>
  T* Take(size_t count) {
    return static_cast<T*>(TakeBytes(count * sizeof(T)));
  }

  // Invalidates all that was taken. Several chunks become one of their total size, up to kKeep.
  void Reset() noexcept;

 private:
  static constexpr size_t kKeep = size_t{64} << 20;
  struct Free {
    void operator()(std::byte* memory) const;
  };
  struct Chunk {
    std::unique_ptr<std::byte, Free> memory;
    size_t bytes = 0;
  };

  void* TakeBytes(size_t bytes);
  void AddChunk(size_t bytes);

  std::vector<Chunk> chunks_;
  size_t used_ = 0;  // of the last chunk
};

// Holds an arena for the length of one kernel call.
class CallArena {
 public:
  CallArena();
  ~CallArena();
  CallArena(const CallArena&) = delete;
  CallArena& operator=(const CallArena&) = delete;

  template <class T>
  T* Take(size_t count) {
    return arena_->Take<T>(count);
  }

 private:
  std::unique_ptr<Arena> arena_;
};

// The calling thread's own arena, emptied. Not to be held across a nested call.
Arena& ThreadArena();

// One kernel call, for what each of its threads makes once and keeps until it does so for another call.
class PerThread {
 public:
  PerThread();
  PerThread(const PerThread&) = delete;
  PerThread& operator=(const PerThread&) = delete;

  // Whether this thread has made it.
  bool Has() const { return OfThread().call == call_; }

  // What make(Arena*), which returns a T*, has made on this thread.
  template <class T, class F>
  const T* Once(F&& make) const {
    Kept& kept = OfThread();
    if (kept.call != call_) {
      kept.call = 0;
      kept.arena.Reset();
      kept.made = make(&kept.arena);
      kept.call = call_;
    }
    return static_cast<const T*>(kept.made);
  }

 private:
  struct Kept {
    uint64_t call = 0;
    Arena arena;
    const void* made = nullptr;
  };
  static Kept& OfThread();

  uint64_t call_;  // its number, from 1
};

}  // namespace shadowc
