// SPDX-License-Identifier: Apache-2.0
// The device library's memory behind the interface of the emulation's (tests/emulation/library.py): managed,
// so that the host reads and writes it by address, filled with a pattern, and guarded on both sides.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace {
constexpr size_t kGuard = 4096;
constexpr unsigned char kGuardByte = 0x5A;
}  // namespace

extern "C" {

// Thread orders are the device's own; every case still runs twice, and has to give the same bits.
__attribute__((visibility("default"))) void shadowc_emulation_order(unsigned) {}

__attribute__((visibility("default"))) void* shadowc_emulation_allocate(size_t bytes) {
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, bytes + 2 * kGuard, cudaMemAttachGlobal) != cudaSuccess) return nullptr;
  std::memset(memory, kGuardByte, bytes + 2 * kGuard);
  unsigned char* begin = static_cast<unsigned char*>(memory) + kGuard;
  std::memset(begin, 0xA5, bytes);
  return begin;
}

// Returns 1 if the bytes around the memory are as they were.
__attribute__((visibility("default"))) int shadowc_emulation_release(void* memory, size_t bytes) {
  cudaDeviceSynchronize();
  unsigned char* begin = static_cast<unsigned char*>(memory);
  const auto intact = [](const unsigned char* guard) {
    return std::all_of(guard, guard + kGuard, [](unsigned char c) { return c == kGuardByte; });
  };
  const bool whole = intact(begin - kGuard) && intact(begin + bytes);
  return cudaFree(begin - kGuard) == cudaSuccess && whole;
}

// Waits for all that was enqueued; a cudaError_t.
__attribute__((visibility("default"))) int shadowc_device_synchronize() { return cudaDeviceSynchronize(); }
}
