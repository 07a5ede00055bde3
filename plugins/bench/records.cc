// SPDX-License-Identifier: Apache-2.0
// What memory gives for records that lie apart: as many bytes as SparseFFN reads of int8 records (or of
// longer ones), fetched as the kernels fetch them (plugins/cpu/in_order-inl.h), and nothing computed but a
// checksum. Its dense neighbour reads all of them, so `of_dense` is what a share of the records takes of the
// whole.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <string>

#include "measure.h"

namespace bench {
namespace {

constexpr size_t kLine = 64, kLayer = size_t{32} << 20, kPiece = size_t{256} << 10;

struct Records {
  const unsigned char* base;
  size_t shift;  // a record has 2^shift bytes: a division would take longer than a line
  const std::vector<uint32_t>& list;

  // Byte `at` of all records that are read, one behind the other; of the last one again behind them.
  const unsigned char* Of(size_t at) const {
    const size_t record = std::min(at >> shift, list.size() - 1), within = at & ((size_t{1} << shift) - 1);
    return base + (size_t{list[record]} << shift) + within;
  }
};

// Returns something of all bytes, so that they are read.
uint64_t ReadPiece(const Records& records, size_t begin, size_t end) {
  constexpr size_t kStep = 4 * kLine, kAhead[] = {8 << 10, 6 << 10, 4 << 10};
  uint64_t sums[kStep / sizeof(uint64_t)] = {};
  for (size_t at = begin; at < end; at += kStep) {
    for (const size_t ahead : kAhead) {
      const unsigned char* later = records.Of(at + ahead);
      for (size_t line = 0; line < kStep; line += kLine) __builtin_prefetch(later + line, 0, 2);
    }
    uint64_t step[std::size(sums)];
    std::memcpy(step, records.Of(at), sizeof step);
    for (size_t i = 0; i < std::size(sums); ++i) sums[i] ^= step[i];
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all ^= sum;
  return all;
}

Operator Read(size_t shift, const std::vector<uint32_t>& list) {
  return [=, &list](size_t layer) {
    const auto* base = static_cast<const unsigned char*>(LayerOf(shadowc::WeightType::kInt8, kLayer, layer));
    const Records records{base, shift, list};
    const size_t total = list.size() << shift;
    std::atomic<uint64_t> all{0};
    ThePool().For((total + kPiece - 1) / kPiece, [&](size_t piece) {
      all ^= ReadPiece(records, piece * kPiece, std::min(total, (piece + 1) * kPiece));
    });
    benchmark::DoNotOptimize(all.load());
    return static_cast<double>(total);
  };
}

std::vector<uint32_t> Listed(size_t records, float kept) {
  std::vector<uint32_t> list;
  const std::vector<float> drawn = Uniform(records, 0, 1);
  for (size_t i = 0; i < records; ++i) {
    if (drawn[i] < kept) list.push_back(static_cast<uint32_t>(i));
  }
  return list;
}

void Run(benchmark::State& state, size_t shift, float kept) {
  const std::vector<uint32_t> list = Listed(kLayer >> shift, kept), all = Listed(kLayer >> shift, 2.0f);
  Compare(state, Read(shift, list), Read(shift, all));
}

}  // namespace

void RegisterRecords() {
  for (const size_t shift : {12, 13, 14}) {
    for (const float kept : {1.0f, 0.5f, 0.2f}) {
      const std::string title = "ReadRecords/bytes:" + std::to_string(size_t{1} << shift) +
                                "/kept:" + std::to_string(static_cast<int>(kept * 100));
      benchmark::RegisterBenchmark(title.c_str(), Run, shift, kept)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace bench
