// SPDX-License-Identifier: Apache-2.0
// How far apart two threads are: what it takes them to hand each other a cache line. Cores below one last
// cache need a fraction of what others need, share its way to memory, and a virtual machine may find its
// cores moved from one to the other between two seconds.
#pragma once

namespace shadowc {

// Nanoseconds of a round trip, the shortest mean over one of `repeats` series; the threads are of its own. 0
// if the process may use one core only, `repeats` is not positive, or the machine grants no more threads.
double RoundTrip(int repeats);

}  // namespace shadowc
