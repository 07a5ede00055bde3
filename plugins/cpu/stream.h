// SPDX-License-Identifier: Apache-2.0
// The machine's read bandwidth: what the speed of a kernel that reads each weight once is measured against.
#pragma once

#include <cstddef>

namespace shadowc {

// Best bytes per second over `repeats` sequential reads of `bytes` of memory, cut evenly among `threads`
// threads of its own, each of which first touched its part. 0 if an argument is 0 or memory is short.
double StreamRead(size_t bytes, int threads, int repeats);

}  // namespace shadowc
