// SPDX-License-Identifier: Apache-2.0
// The machine's read bandwidth: what the speed of a kernel that reads each weight once is measured against.
#pragma once

#include <cstddef>

namespace shadowc {

// Best bytes per second over `repeats` sequential reads of `bytes` of memory, cut evenly among `threads`
// threads of its own, each of which first touched its part. 0 if an argument is 0 or memory is short.
double StreamRead(size_t bytes, int threads, int repeats);

// The same of memory that is there already, which may be slower than what the system gives now; of whole
// pages. Memory that is small enough for the caches is read from them.
double StreamOver(const std::byte* memory, size_t bytes, int threads, int repeats);

}  // namespace shadowc
