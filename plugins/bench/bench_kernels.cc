// SPDX-License-Identifier: Apache-2.0
// Times the kernels at the shape of OPT-1.3B, int8 weights, against the machine's stream bandwidth.
//   bench_kernels [THREADS=all] [PASSES=8]
// Each line: milliseconds of the best layer, bytes really read, GB/s, and the share of the stream
// bandwidth measured just before. The dense neighbour of each line is the one with density 1.00. Prefill
// lines say GFLOP/s.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "select_threshold.h"
#include "sparse_attention.h"
#include "sparse_ffn.h"
#include "stream.h"

namespace {

using shadowc::Parallel;
using Clock = std::chrono::steady_clock;

constexpr size_t kWidth = 2048, kNeurons = 8192, kHeads = 32, kHeadSize = 64, kCapacity = 640;
constexpr size_t kLayers = 24;  // even a tenth of their weights exceeds the caches

// Threads that spin between jobs, as ONNX Runtime's do.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this] { Work(); });
  }
  ~Pool() {
    stop_ = true;
    for (std::thread& worker : workers_) worker.join();
  }
  Parallel Handle() {
    return Parallel([](void* pool, size_t total, Parallel::Body body,
                       void* closure) { static_cast<Pool*>(pool)->Run(total, body, closure); },
                    this);
  }

 private:
  void Run(size_t total, Parallel::Body body, void* closure) {
    body_ = body, closure_ = closure, total_ = total;
    done_ = 0;
    next_ = 0;
    ++job_;
    Drain();
    while (done_ != workers_.size()) std::this_thread::yield();
  }
  void Drain() {
    for (size_t i = next_++; i < total_; i = next_++) body_(closure_, i);
  }
  void Work() {
    for (size_t seen = 0; !stop_;) {
      if (job_ == seen) continue;
      ++seen;
      Drain();
      ++done_;
    }
  }

  Parallel::Body body_ = nullptr;
  void* closure_ = nullptr;
  size_t total_ = 0;
  std::atomic<size_t> next_{0}, done_{0}, job_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

std::mt19937 random_bits(7);

std::vector<float> Floats(size_t n, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> values(n);
  for (float& value : values) value = uniform(random_bits);
  return values;
}

// Weights as in a mapped file: page aligned, so that a record of 4 KiB lies in one page.
struct Weights {
  explicit Weights(size_t n) : memory(static_cast<int8_t*>(std::aligned_alloc(4096, n))) {
    uint32_t state = 1;
    for (size_t i = 0; i < n; ++i)
      memory[i] = static_cast<int8_t>((state = state * 1664525u + 1013904223u) >> 24);
  }
  ~Weights() { std::free(memory); }
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;
  int8_t* memory;
};

struct Line {
  double seconds = std::numeric_limits<double>::infinity();
  double bytes = 0;
};

// Best single layer of all passes: short windows, because the machine may be shared.
template <class F>
Line Time(int passes, F&& layer) {
  Line line;
  for (int p = 0; p < passes; ++p) {
    for (size_t l = 0; l < kLayers; ++l) {
      const Clock::time_point begin = Clock::now();
      const double bytes = static_cast<double>(layer(l).bytes);
      const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      if (seconds < line.seconds) line = {seconds, bytes};
    }
  }
  return line;
}

double Stream(int threads) { return shadowc::StreamRead(size_t{128} << 20, threads, 40); }

void Print(const char* what, double density, const Line& line, double stream) {
  std::printf("%-34s %5.2f %9.3f ms %9.2f MB %7.1f GB/s %6.2f of stream\n", what, density, line.seconds * 1e3,
              line.bytes / 1e6, line.bytes / line.seconds / 1e9, line.bytes / line.seconds / stream);
}

struct Ffn {
  Weights w{kLayers * kNeurons * 2 * kWidth};
  std::vector<float> scales = std::vector<float>(kNeurons * 2, 1e-3f), b1 = std::vector<float>(kNeurons),
                     b2 = std::vector<float>(kWidth), x = Floats(512 * kWidth, -1, 1),
                     y = std::vector<float>(512 * kWidth), scores = Floats(kNeurons, 0, 1);

  shadowc::ReadCount Run(size_t layer, size_t rows, float density, size_t block, bool skip,
                         const Parallel& parallel) {
    const float threshold = 1.0f - density;
    shadowc::FfnArgs a{};
    a.x = x.data(), a.batch = rows, a.tokens = 1, a.width = kWidth;
    a.selection.scores = scores.data(), a.selection.threshold = &threshold;
    a.selection.tail = 1, a.selection.units = kNeurons / block;
    a.type = shadowc::WeightType::kInt8;
    a.w = w.memory + layer * kNeurons * 2 * kWidth;
    a.scales = scales.data(), a.b1 = b1.data(), a.b2 = b2.data();
    a.neurons = kNeurons, a.block = block, a.skip_zeros = skip, a.y = y.data();
    return shadowc::SparseFfn(a, parallel);
  }
};

struct Attention {
  Weights w{kLayers * kHeads * 4 * kHeadSize * kWidth};
  std::vector<float> scales = std::vector<float>(kHeads * 4 * kHeadSize, 1e-3f),
                     bqkv = std::vector<float>(kHeads * 3 * kHeadSize), bo = std::vector<float>(kWidth),
                     x = Floats(512 * kWidth, -1, 1), y = std::vector<float>(512 * kWidth),
                     context = std::vector<float>(512 * kWidth), scores = Floats(kHeads, 0, 1),
                     key = Floats(kHeads * kCapacity * kHeadSize, -1, 1),
                     value = Floats(kHeads * kCapacity * kHeadSize, -1, 1);

  shadowc::ReadCount Run(size_t layer, size_t tokens, int64_t past, float density, bool active_only,
                         const Parallel& parallel) {
    const float threshold = 1.0f - density;
    const int64_t start = 0;
    shadowc::AttentionArgs a{};
    a.x = x.data(), a.batch = 1, a.tokens = tokens, a.width = kWidth;
    a.selection.scores = scores.data(), a.selection.threshold = &threshold;
    a.selection.tail = 1, a.selection.units = kHeads;
    a.type = shadowc::WeightType::kInt8;
    a.w = w.memory + layer * kHeads * 4 * kHeadSize * kWidth;
    a.scales = scales.data(), a.bqkv = bqkv.data(), a.bo = bo.data();
    a.heads = kHeads, a.head_size = kHeadSize, a.capacity = kCapacity;
    a.past_key = a.present_key = key.data(), a.past_value = a.present_value = value.data();
    a.start = &start, a.past = &past, a.kv_active_only = active_only;
    a.y = y.data(), a.context = context.data();
    return shadowc::SparseAttention(a, parallel);
  }
};

void BenchFfn(int threads, int passes, const Parallel& parallel) {
  Ffn ffn;
  for (const float density : {1.0f, 0.5f, 0.2f, 0.1f}) {
    const double stream = Stream(threads);
    Print("FFN", density, Time(passes, [&](size_t l) { return ffn.Run(l, 1, density, 1, false, parallel); }),
          stream);
  }
  // With x in -1 ... 1 about half of the neurons fire; a negative bias leaves some 8 %, as in a real OPT.
  for (const float bias : {0.0f, -2.8f}) {
    std::fill(ffn.b1.begin(), ffn.b1.end(), bias);
    const double stream = Stream(threads);
    Print(bias == 0 ? "FFN skip_zeros, half fire" : "FFN skip_zeros, few fire", 1.0,
          Time(passes, [&](size_t l) { return ffn.Run(l, 1, 1.0f, 1, true, parallel); }), stream);
  }
  std::fill(ffn.b1.begin(), ffn.b1.end(), 0.0f);
  for (const size_t rows : {2, 4, 8}) {
    const double stream = Stream(threads);
    char what[64];
    std::snprintf(what, sizeof what, "FFN, %zu rows", rows);
    Print(what, 1.0, Time(passes, [&](size_t l) { return ffn.Run(l, rows, 1.0f, 1, false, parallel); }),
          stream);
  }
  const Line line = Time(1, [&](size_t l) { return ffn.Run(l, 512, 1.0f, 1, false, parallel); });
  std::printf("%-34s %5.2f %9.3f ms %9.2f MB %7.1f GFLOP/s\n", "FFN prefill, 512 rows", 1.0,
              line.seconds * 1e3, line.bytes / 1e6, 4.0 * kWidth * kNeurons * 512 / line.seconds / 1e9);
}

void BenchAttention(int threads, int passes, const Parallel& parallel) {
  Attention attention;
  for (const bool active_only : {false, true}) {
    for (const float density : {1.0f, 0.5f, 0.2f}) {
      const double stream = Stream(threads);
      const auto run = [&](size_t l) { return attention.Run(l, 1, 128, density, active_only, parallel); };
      Print(active_only ? "attention kv=active, 128 past" : "attention kv=all, 128 past", density,
            Time(passes, run), stream);
    }
  }
  const Line line = Time(1, [&](size_t l) { return attention.Run(l, 512, 0, 1.0f, false, parallel); });
  std::printf("%-34s %5.2f %9.3f ms %9.2f MB %7.1f GFLOP/s\n", "attention prefill, 512 tokens", 1.0,
              line.seconds * 1e3, line.bytes / 1e6,
              (8.0 * kWidth * kWidth * 512 + 2.0 * kWidth * 512 * 512) / line.seconds / 1e9);
}

void BenchSelect(int passes, const Parallel& parallel) {
  constexpr size_t kPredicted = 23;
  const std::vector<float> scores = Floats(kPredicted * kNeurons, 0, 1);
  std::vector<float> threshold(kPredicted);
  std::vector<int32_t> active(kPredicted);
  const float density = 0.2f;
  shadowc::SelectArgs a{};
  a.scores = scores.data(), a.density = &density, a.batch = a.tail = a.density_count = 1;
  a.layers = kPredicted, a.units = kNeurons, a.exempt.assign(kPredicted, 0);
  a.threshold = threshold.data(), a.active = active.data();
  for (const bool global : {false, true}) {
    a.global = global;
    double best = std::numeric_limits<double>::infinity();
    for (int p = 0; p < passes * 4; ++p) {
      const Clock::time_point begin = Clock::now();
      shadowc::SelectThreshold(a, parallel);
      best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
    }
    std::printf("%-34s %5.2f %9.3f ms for 23 layers of 8192\n", global ? "select global" : "select local",
                density, best * 1e3);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  const int passes = argc > 2 ? std::atoi(argv[2]) : 8;
  if (!shadowc::ApplyIsaLimit().empty()) {
    std::fprintf(stderr, "%s\n", shadowc::ApplyIsaLimit().c_str());
    return 2;
  }
  std::printf("ISA %s, %d threads, stream %.1f GB/s\n", shadowc::ChosenIsa(), threads, Stream(threads) / 1e9);
  Pool pool(threads);
  const Parallel parallel = pool.Handle();
  BenchFfn(threads, passes, parallel);
  BenchAttention(threads, passes, parallel);
  BenchSelect(passes, parallel);
}
