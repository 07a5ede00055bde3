// SPDX-License-Identifier: Apache-2.0
#include "arena.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>

namespace shadowc {
namespace {

struct Pool {
  std::mutex mutex;
  std::vector<std::unique_ptr<Arena>> idle;
};

Pool& ThePool() {
  // Never destroyed: a host may run its last kernel while static objects are already being torn down.
  static Pool* pool = new Pool;
  return *pool;
}

size_t RoundUp(size_t bytes) { return (bytes + Arena::kAlign - 1) / Arena::kAlign * Arena::kAlign; }

}  // namespace

void Arena::Free::operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kAlign}); }

void Arena::AddChunk(size_t bytes) {
  Chunk chunk;
  chunk.memory.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlign})));
  chunk.bytes = bytes;
  chunks_.push_back(std::move(chunk));
  used_ = 0;
}

void* Arena::TakeBytes(size_t bytes) {
  bytes = RoundUp(std::max<size_t>(bytes, 1));
  if (chunks_.empty() || chunks_.back().bytes - used_ < bytes) {
    AddChunk(std::max(bytes, size_t{64} << 10));
  }
  void* taken = chunks_.back().memory.get() + used_;
  used_ += bytes;
  return taken;
}

void Arena::Reset() noexcept {
  used_ = 0;
  size_t total = 0;
  for (const Chunk& chunk : chunks_) total += chunk.bytes;
  if (chunks_.size() <= 1 && total <= kKeep) return;
  chunks_.clear();
  try {
    AddChunk(std::min(total, kKeep));
  } catch (const std::bad_alloc&) {
    // Stays empty: the next Take allocates, and fails where failing is allowed.
  }
}

CallArena::CallArena() {
  Pool& pool = ThePool();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  if (pool.idle.empty()) {
    arena_ = std::make_unique<Arena>();
  } else {
    arena_ = std::move(pool.idle.back());
    pool.idle.pop_back();
  }
}

CallArena::~CallArena() {
  arena_->Reset();
  Pool& pool = ThePool();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  try {
    pool.idle.push_back(std::move(arena_));
  } catch (const std::bad_alloc&) {
    // Not kept: the next call makes another.
  }
}

Arena& ThreadArena() {
  thread_local Arena arena;
  arena.Reset();
  return arena;
}

PerThread::PerThread() {
  static std::atomic<uint64_t> calls{0};
  call_ = calls.fetch_add(1, std::memory_order_relaxed) + 1;
}

PerThread::Kept& PerThread::OfThread() {
  thread_local Kept kept;
  return kept;
}

}  // namespace shadowc
