// SPDX-License-Identifier: Apache-2.0
// x86-64: a switch saves six registers, some nanoseconds. Elsewhere: ucontext, which also saves the signal
// mask.
#include "fiber.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulation {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Start {
  void (*entry)(const void*);
  const void* argument;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Start start{};
  void* shadow = nullptr;  // of AddressSanitizer
#ifndef __x86_64__
  ucontext_t context;
#endif
};

std::vector<std::unique_ptr<Fiber>> fibers;
int current;

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_bottom;
size_t scheduler_size;
void* scheduler_shadow;
void before_fiber() {
  __sanitizer_start_switch_fiber(&scheduler_shadow, fibers[current]->stack.get(), kStackBytes);
}
void in_fiber() {
  __sanitizer_finish_switch_fiber(fibers[current]->shadow, &scheduler_bottom, &scheduler_size);
}
void before_scheduler() {
  __sanitizer_start_switch_fiber(&fibers[current]->shadow, scheduler_bottom, scheduler_size);
}
void in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_shadow, nullptr, nullptr); }
#else
void before_fiber() {}
void in_fiber() {}
void before_scheduler() {}
void in_scheduler() {}
#endif

void run_entry() {
  in_fiber();
  const Start start = fibers[current]->start;
  start.entry(start.argument);
  std::abort();
}

}  // namespace

#ifdef __x86_64__

// Saves the callee-saved registers and the stack pointer in *save, continues at `to`.
extern "C" void shadowc_emulation_switch(void** save, void* to);
asm(R"(
.text
.globl shadowc_emulation_switch
.hidden shadowc_emulation_switch
.type shadowc_emulation_switch, @function
shadowc_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shadowc_emulation_switch, . - shadowc_emulation_switch
)");

namespace {
void* scheduler_stack;
}

void prepare(int number, void** stack, void (*entry)(const void*), const void* argument) {
  while (static_cast<size_t>(number) >= fibers.size()) fibers.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *fibers[number];
  fiber.start = {entry, argument};
  fiber.shadow = nullptr;
  const uintptr_t end = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) / 16 * 16;
  void** top =
      reinterpret_cast<void**>(end) - 8;  // six registers, the address to return to, and one for alignment
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&run_entry);
  top[7] = nullptr;
  *stack = top;
}

void resume(int number, void** stack) {
  current = number;
  before_fiber();
  shadowc_emulation_switch(&scheduler_stack, *stack);
  in_scheduler();
}

void pause(void** stack) {
  before_scheduler();
  shadowc_emulation_switch(stack, scheduler_stack);
  in_fiber();
}

#else

namespace {
ucontext_t scheduler_context;
}

void prepare(int number, void**, void (*entry)(const void*), const void* argument) {
  while (static_cast<size_t>(number) >= fibers.size()) fibers.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *fibers[number];
  fiber.start = {entry, argument};
  fiber.shadow = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_entry, 0);
}

void resume(int number, void**) {
  current = number;
  before_fiber();
  swapcontext(&scheduler_context, &fibers[number]->context);
  in_scheduler();
}

void pause(void**) {
  before_scheduler();
  swapcontext(&fibers[current]->context, &scheduler_context);
  in_fiber();
}

#endif

}  // namespace emulation
