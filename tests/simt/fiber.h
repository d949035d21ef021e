// One thread of a block as a fiber: a stack of its own, and a switch to it and back.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Keeps the registers that a call must leave alone, and the stack pointer in *from; goes on where `to` was
// kept.
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_FRAME_WORDS 8  // r15 r14 r13 r12 rbx rbp, where to go, and nobody to return to
#define SIMT_FRAME_ENTRY 6
asm(R"(
  .pushsection .text
  .weak simt_switch
  .hidden simt_switch
  .type simt_switch, @function
simt_switch:
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
  .size simt_switch, . - simt_switch
  .popsection
)");
#elif defined(__aarch64__) && !defined(SIMT_UCONTEXT)
#define SIMT_FRAME_WORDS 20  // x19 to x28, the frame pointer, where to go, d8 to d15
#define SIMT_FRAME_ENTRY 11
asm(R"(
  .pushsection .text
  .weak simt_switch
  .hidden simt_switch
  .type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size simt_switch, . - simt_switch
  .popsection
)");
#else
#include <ucontext.h>
#endif
#if defined(SIMT_FRAME_WORDS)
extern "C" void simt_switch(void** from, void* to);
#endif

namespace simt {

class Fiber {
 public:
  // `body(argument)` must neither throw nor return. It starts at the first resume().
  Fiber(void (*body)(void*), void* argument) : body_(body), argument_(argument) {
    // The lowest page stays forbidden: a stack that grows too far ends the process there.
    void* const memory =
        mmap(nullptr, guard_bytes + stack_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory) + guard_bytes;
    if (mprotect(stack_, stack_bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    restart();
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    forget_frames();
    munmap(stack_ - guard_bytes, guard_bytes + stack_bytes);
  }

  // Drops what the fiber was at: the next resume() begins `body` anew.
  void restart() {
    forget_frames();
    own_fake_ = nullptr;
#if defined(SIMT_FRAME_WORDS)
    auto* const frame = reinterpret_cast<uintptr_t*>(stack_ + stack_bytes) - SIMT_FRAME_WORDS;
    for (int i = 0; i < SIMT_FRAME_WORDS; ++i) frame[i] = 0;
    frame[SIMT_FRAME_ENTRY] = reinterpret_cast<uintptr_t>(&Fiber::start);
    own_ = frame;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = stack_bytes;
    own_.uc_link = nullptr;
    makecontext(&own_, &Fiber::start, 0);
#endif
  }

  // Runs the fiber until it suspends itself.
  void resume() {
    running() = this;
    cross(caller_, own_, caller_fake_, stack_, stack_bytes);
  }

  // Called by the fiber itself: back to whoever resumed it.
  void suspend() { cross(own_, caller_, own_fake_, caller_stack_, caller_stack_bytes_); }

 private:
#if defined(SIMT_FRAME_WORDS)
  using Context = void*;
#else
  using Context = ucontext_t;
#endif
  static constexpr size_t stack_bytes = 256 * 1024, guard_bytes = 64 * 1024;

  static Fiber*& running() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  static void start() {
    Fiber* const fiber = running();
    fiber->arrived(nullptr);
    fiber->body_(fiber->argument_);
    __builtin_trap();
  }

  void cross(Context& from, Context& to, void*& fake, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake, stack, bytes);
#else
    static_cast<void>(stack);
    static_cast<void>(bytes);
#endif
#if defined(SIMT_FRAME_WORDS)
    simt_switch(&from, to);
#else
    swapcontext(&from, &to);
#endif
    arrived(fake);
  }

  // The sanitizer learns where it is; a fiber learns the stack that it must go back to.
  void arrived(void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake, &stack, &bytes);
    if (stack != stack_) {
      caller_stack_ = stack;
      caller_stack_bytes_ = bytes;
    }
#else
    static_cast<void>(fake);
#endif
  }

  void forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, stack_bytes);
#endif
  }

  void (*body_)(void*);
  void* argument_;
  char* stack_ = nullptr;
  Context own_{}, caller_{};
  void *own_fake_ = nullptr, *caller_fake_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
};

}  // namespace simt
