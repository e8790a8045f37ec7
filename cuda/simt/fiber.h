// Fibers: a stack of its own for every CUDA thread, and switches between a fiber and the scheduler.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(MEGALODON_SIMT_UCONTEXT)
#define MEGALODON_SIMT_USE_UCONTEXT 1
#include <ucontext.h>
#else
#define MEGALODON_SIMT_USE_UCONTEXT 0
#endif

namespace megalodon::simt {

struct Fiber {
  char* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
#if MEGALODON_SIMT_USE_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Makes the fiber start `entry`, which must never return, at the next enter().
void prepare(Fiber& fiber, void (*entry)());
// Scheduler -> fiber; comes back when the fiber leaves.
void enter(Fiber& fiber);
// Fiber -> scheduler. A finished fiber is not entered again.
void leave(Fiber& fiber, bool finished);
// The first thing that `entry` does.
void on_start();
// Whether the fiber has ever used the last bytes of its stack.
bool overflowed(const Fiber& fiber);
// Makes the whole stack accessible again (AddressSanitizer poisons the frames of an abandoned fiber).
void forget(Fiber& fiber);

}  // namespace megalodon::simt
