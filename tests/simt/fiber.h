// One thread of a block as a fiber: a stack of its own, and a switch to it and back.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

class Fiber {
 public:
  // `body` must not throw. It starts at the first resume().
  explicit Fiber(std::function<void()> body) : stack_(new char[stack_bytes]), body_(std::move(body)) {
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.get();
    own_.uc_stack.ss_size = stack_bytes;
    own_.uc_link = nullptr;
    // makecontext passes ints only.
    const auto address = reinterpret_cast<uintptr_t>(this);
    makecontext(&own_, reinterpret_cast<void (*)()>(&Fiber::start), 2, static_cast<unsigned>(address),
                static_cast<unsigned>(static_cast<uint64_t>(address) >> 32));
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the fiber until it suspends itself or ends.
  void resume() { cross(caller_, own_, caller_fake_, stack_.get(), stack_bytes); }

  // Called by the fiber itself: back to whoever resumed it.
  void suspend() { cross(own_, caller_, own_fake_, caller_stack_, caller_stack_bytes_); }

 private:
  static constexpr size_t stack_bytes = 128 * 1024;

  static void start(unsigned low, unsigned high) {
    auto* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(low | static_cast<uint64_t>(high) << 32));
    fiber->arrived(nullptr);
    fiber->body_();
    fiber->suspend();
  }

  void cross(ucontext_t& from, ucontext_t& to, void*& fake, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake, stack, bytes);
#else
    static_cast<void>(stack);
    static_cast<void>(bytes);
#endif
    swapcontext(&from, &to);
    arrived(fake);
  }

  // The sanitizer learns where it is; a fiber learns the stack that it must go back to.
  void arrived(void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake, &stack, &bytes);
    if (stack != stack_.get()) {
      caller_stack_ = stack;
      caller_stack_bytes_ = bytes;
    }
#else
    static_cast<void>(fake);
#endif
  }

  std::unique_ptr<char[]> stack_;
  std::function<void()> body_;
  ucontext_t own_{}, caller_{};
  void *own_fake_ = nullptr, *caller_fake_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
};

}  // namespace simt
