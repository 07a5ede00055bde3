// SPDX-License-Identifier: Apache-2.0
// Threads for kernels under test. Index i runs on thread i % threads, and nothing but the start and the end
// of a section orders two threads: so a race between two indices is one that ThreadSanitizer sees every time,
// however few cores there are. Hence two locks: with one, a thread that has finished would release what a
// late one acquires.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel.h"

class Pool {
 public:
  // twice: every index also runs on the next thread, which is a race in whatever the kernel writes.
  Pool(size_t threads, bool twice) : threads_(threads), twice_(twice) {
    for (size_t t = 1; t < threads; ++t) workers_.emplace_back([this, t] { Work(t); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(start_mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  shadowc::Parallel Handle() { return Handle(threads_); }
  // One that says that there are so many.
  shadowc::Parallel Handle(size_t likely) {
    return shadowc::Parallel([](void* pool, size_t total, shadowc::Parallel::Body body,
                                void* closure) { static_cast<Pool*>(pool)->Run(total, body, closure); },
                             this, likely);
  }

 private:
  void Run(size_t total, shadowc::Parallel::Body body, void* closure) {
    {
      const std::lock_guard<std::mutex> lock(start_mutex_);
      total_ = total, body_ = body, closure_ = closure;
      busy_ = workers_.size();
      ++section_;
    }
    start_.notify_all();
    Share(0);
    std::unique_lock<std::mutex> lock(end_mutex_);
    end_.wait(lock, [this] { return busy_ == 0; });
  }

  void Share(size_t thread) {
    for (size_t i = 0; i < total_; ++i) {
      if (i % threads_ == thread || (twice_ && (i + 1) % threads_ == thread)) body_(closure_, i);
    }
  }

  void Work(size_t thread) {
    for (size_t seen = 0;; ++seen) {
      {
        std::unique_lock<std::mutex> lock(start_mutex_);
        start_.wait(lock, [&] { return stop_ || section_ != seen; });
        if (stop_) return;
      }
      Share(thread);
      {
        const std::lock_guard<std::mutex> lock(end_mutex_);
        --busy_;
      }
      end_.notify_one();
    }
  }

  const size_t threads_;
  const bool twice_;
  std::mutex start_mutex_, end_mutex_;
  std::condition_variable start_, end_;
  size_t total_ = 0, section_ = 0, busy_ = 0;
  shadowc::Parallel::Body body_ = nullptr;
  void* closure_ = nullptr;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};
