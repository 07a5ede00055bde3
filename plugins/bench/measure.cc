// SPDX-License-Identifier: Apache-2.0
#include "measure.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <type_traits>

#include "stream.h"

namespace bench {

int threads = 1;

namespace {

using Clock = std::chrono::steady_clock;

// Threads that spin between sections, as those of ONNX Runtime do while a token is computed.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this] { Work(); });
  }
  ~Pool() {
    stop_ = true;
    for (std::thread& worker : workers_) worker.join();
  }

  void Run(size_t total, shadowc::Parallel::Body body, void* closure) {
    body_ = body, closure_ = closure, total_ = total;
    done_ = 0;
    next_ = 0;
    ++section_;
    Drain();
    while (done_ != workers_.size()) std::this_thread::yield();
  }

  // f() while no worker spins: whoever measures the machine needs its cores.
  template <class F>
  auto Alone(F f) {
    resting_ = true;
    const auto result = f();
    resting_ = false;
    resting_.notify_all();
    Run(1, [](void*, size_t) {}, nullptr);  // so that none still wakes up in what is timed next
    return result;
  }

 private:
  void Drain() {
    for (size_t i = next_++; i < total_; i = next_++) body_(closure_, i);
  }
  void Work() {
    for (size_t seen = 0; !stop_;) {
      if (section_ == seen) {
        resting_.wait(true);
        continue;
      }
      ++seen;
      Drain();
      ++done_;
    }
  }

  shadowc::Parallel::Body body_ = nullptr;
  void* closure_ = nullptr;
  size_t total_ = 0;
  std::atomic<size_t> next_{0}, done_{0}, section_{0};
  std::atomic<bool> stop_{false}, resting_{false};
  std::vector<std::thread> workers_;
};

Pool& OurPool() {
  static Pool pool(threads);
  return pool;
}

double Seconds(const Operator& op, size_t layer, double* bytes) {
  const Clock::time_point begin = Clock::now();
  *bytes = op(layer);
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

size_t BytesOf(shadowc::WeightType type, size_t elements) {
  size_t bytes = 0;
  shadowc::DispatchWeights(type, [&](auto pointer) {
    using W = std::remove_cv_t<std::remove_pointer_t<decltype(pointer)>>;
    bytes = shadowc::RowElements<W>(elements) * sizeof(W);
  });
  return bytes;
}

// The memory of a shared machine changes its pace within seconds, so the bandwidth is read again as often.
class Bandwidth {
 public:
  double Now() {
    constexpr std::chrono::milliseconds kHolds(200);
    if (value_ == 0 || Clock::now() - read_ > kHolds) {
      value_ = OurPool().Alone([] { return shadowc::StreamRead(size_t{128} << 20, threads, 4); });
      read_ = Clock::now();
    }
    return value_;
  }

 private:
  double value_ = 0;
  Clock::time_point read_;
};

constexpr size_t kBuffer = size_t{1} << 30;

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};

std::unique_ptr<std::byte, Free> RandomWeights(shadowc::WeightType type) {
  constexpr size_t kLargePage = size_t{2} << 20;
  std::unique_ptr<std::byte, Free> buffer(static_cast<std::byte*>(std::aligned_alloc(kLargePage, kBuffer)));
  if (buffer == nullptr) throw std::bad_alloc();
  madvise(buffer.get(), kBuffer, MADV_HUGEPAGE);  // as engines ask for; small pages cost a fifth and more
  constexpr size_t kPiece = size_t{1} << 24;
  if (type == shadowc::WeightType::kFloat32) {
    const std::vector<float> values = Uniform(kPiece / sizeof(float), -0.1f, 0.1f);
    std::memcpy(buffer.get(), values.data(), kPiece);
  } else if (type == shadowc::WeightType::kBFloat16) {
    const std::vector<float> values = Uniform(kPiece / 2, -0.1f, 0.1f);
    for (size_t i = 0; i < values.size(); ++i)  // the upper half of a float
      std::memcpy(buffer.get() + 2 * i, reinterpret_cast<const std::byte*>(&values[i]) + 2, 2);
  } else {
    std::mt19937 random_bits(7);
    for (size_t i = 0; i < kPiece; ++i) buffer.get()[i] = static_cast<std::byte>(random_bits() >> 24);
  }
  for (size_t at = kPiece; at < kBuffer; at += kPiece) std::memcpy(buffer.get() + at, buffer.get(), kPiece);
  return buffer;
}

}  // namespace

const shadowc::Parallel& ThePool() {
  static const shadowc::Parallel parallel(
      [](void* self, size_t total, shadowc::Parallel::Body body, void* closure) {
        static_cast<Pool*>(self)->Run(total, body, closure);
      },
      &OurPool());
  return parallel;
}

const void* LayerOf(shadowc::WeightType type, size_t elements, size_t layer) {
  static std::map<shadowc::WeightType, std::unique_ptr<std::byte, Free>> buffers;
  std::unique_ptr<std::byte, Free>& buffer = buffers[type];
  if (buffer == nullptr) buffer = RandomWeights(type);
  const size_t bytes = BytesOf(type, elements);
  return buffer.get() + layer % (kBuffer / bytes) * bytes;
}

std::vector<float> Uniform(size_t count, float low, float high) {
  static std::mt19937 random_bits(7);
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random_bits);
  return values;
}

void Compare(benchmark::State& state, const Operator& op, const Operator& dense) {
  Bandwidth bandwidth;
  double bytes = 0, unused = 0, all_bytes = 0, time = 0, dense_time = 0, floor = 0;
  size_t layer = 0;
  Seconds(op, layer, &bytes);
  for (auto _ : state) {
    const double now = bandwidth.Now();
    dense_time += Seconds(dense, layer++, &unused);
    const double seconds = Seconds(op, layer++, &bytes);
    state.SetIterationTime(seconds);
    time += seconds;
    all_bytes += bytes;
    floor += bytes / now;
  }
  state.SetBytesProcessed(static_cast<int64_t>(all_bytes));
  state.counters["floor_ms"] = benchmark::Counter(1e3 * floor, benchmark::Counter::kAvgIterations);
  state.counters["of_floor"] = time / floor;
  state.counters["of_dense"] = time / dense_time;
}

}  // namespace bench
