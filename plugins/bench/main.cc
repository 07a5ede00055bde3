// SPDX-License-Identifier: Apache-2.0
// bench_kernels: one micro-benchmark per operator, weight type and density, at the shape of OPT-1.3B.
//   bench_kernels [--threads=N] [--benchmark_filter=int8/rows:1 and the other flags of google-benchmark]
// What the columns mean stands at Compare in measure.h.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "isa.h"
#include "measure.h"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  bench::threads = static_cast<int>(std::thread::hardware_concurrency());
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i], name = "--threads=";
    const int asked = flag.rfind(name, 0) == 0 ? std::atoi(flag.c_str() + name.size()) : 0;
    if (asked < 1) {
      std::fprintf(stderr, "bench_kernels: expected --threads=N with N at least 1, found '%s'\n", argv[i]);
      return 2;
    }
    bench::threads = asked;
  }
  if (!shadowc::ApplyIsaLimit().empty()) {
    std::fprintf(stderr, "%s\n", shadowc::ApplyIsaLimit().c_str());
    return 2;
  }
  benchmark::AddCustomContext("isa", shadowc::ChosenIsa());
  benchmark::AddCustomContext("threads", std::to_string(bench::threads));
  bench::RegisterFfn();
  bench::RegisterAttention();
  bench::RegisterSelect();
  bench::RegisterPredict();
  bench::RegisterMatMul();
  bench::RegisterRecords();
  benchmark::RunSpecifiedBenchmarks();
}
