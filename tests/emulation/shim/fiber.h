// SPDX-License-Identifier: Apache-2.0
// Stacks that a single host thread switches between: one for the scheduler and one for each number 0, 1, 2
// ...
#pragma once

namespace emulation {

// Fiber `number` will call entry(argument), which must never return, when *stack is resumed. Its stack is
// kept for the next fiber of the same number.
void prepare(int number, void** stack, void (*entry)(const void*), const void* argument);

// From the scheduler: continue the fiber of that number at *stack, until it pauses.
void resume(int number, void** stack);

// From a fiber: back to the scheduler; *stack remembers where to continue.
void pause(void** stack);

}  // namespace emulation
