# SPDX-License-Identifier: Apache-2.0
# shadowc::benchmark: google-benchmark, for plugins/bench alone.
find_package(benchmark 1.8 QUIET)
if(NOT benchmark_FOUND)
  message(STATUS "google-benchmark: not installed (Debian: libbenchmark-dev), fetching 1.9.1")
  include(FetchContent)
  set(BENCHMARK_ENABLE_TESTING OFF CACHE BOOL "" FORCE)
  set(BENCHMARK_ENABLE_INSTALL OFF CACHE BOOL "" FORCE)
  set(BENCHMARK_ENABLE_WERROR OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(
    benchmark
    URL "https://github.com/google/benchmark/archive/refs/tags/v1.9.1.tar.gz"
    URL_HASH SHA256=32131c08ee31eeff2c8968d7e874f3cb648034377dfc32a4c377fa8796d84981
    DOWNLOAD_EXTRACT_TIMESTAMP OFF
    SYSTEM)
  FetchContent_MakeAvailable(benchmark)
endif()
add_library(shadowc_benchmark INTERFACE)
add_library(shadowc::benchmark ALIAS shadowc_benchmark)
target_link_libraries(shadowc_benchmark INTERFACE benchmark::benchmark)
