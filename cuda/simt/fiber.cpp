#include "simt/fiber.h"

#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace megalodon::simt {
namespace {

constexpr uint64_t kCanary = 0x5afe57ac5afe57acull;
constexpr size_t kEntryBytes = 2048;  // more than what is on a stack when its thread has finished

void unpoison([[maybe_unused]] char* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
#endif

#if MEGALODON_SIMT_USE_UCONTEXT
ucontext_t scheduler_context;
#else
void* scheduler_stack_pointer;
#endif

}  // namespace

#if !MEGALODON_SIMT_USE_UCONTEXT
// Pushes the registers that a call must preserve, changes stacks, pops those of the other side and returns there.
extern "C" void megalodon_simt_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.globl megalodon_simt_switch
.hidden megalodon_simt_switch
.type megalodon_simt_switch,@function
megalodon_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size megalodon_simt_switch,.-megalodon_simt_switch
)");
#endif

void prepare(Fiber& fiber, void (*entry)()) {
  unpoison(fiber.stack + fiber.stack_bytes - kEntryBytes, kEntryBytes);
  std::memcpy(fiber.stack, &kCanary, sizeof kCanary);
  fiber.fake_stack = nullptr;
#if MEGALODON_SIMT_USE_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // What the switch pops: six registers and the address it returns to. The slot above keeps the stack aligned as
  // after a call.
  auto** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, fiber.stack_bytes);
#endif
#if MEGALODON_SIMT_USE_UCONTEXT
  swapcontext(&scheduler_context, &fiber.context);
#else
  megalodon_simt_switch(&scheduler_stack_pointer, fiber.stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void leave(Fiber& fiber, [[maybe_unused]] bool finished) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
#if MEGALODON_SIMT_USE_UCONTEXT
  swapcontext(&fiber.context, &scheduler_context);
#else
  megalodon_simt_switch(&fiber.stack_pointer, scheduler_stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void on_start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

bool overflowed(const Fiber& fiber) { return std::memcmp(fiber.stack, &kCanary, sizeof kCanary) != 0; }

void forget(Fiber& fiber) { unpoison(fiber.stack, fiber.stack_bytes); }

}  // namespace megalodon::simt
