// Kernels that Python launches as they are.
#pragma once

#include "run.h"

inline constexpr int threads = 128;

// A case that launches a kernel `launches` times on `blocks` blocks.
template <auto kernel>
struct Launch;
template <typename... P, void (*kernel)(P...)>
struct Launch<kernel> {
  static const char* call(int blocks, int64_t shared_bytes, int launches, P... arguments, uint64_t seed,
                          simt::Counts* counts) {
    return run(counts, [&] {
      for (int i = 0; i < launches; ++i)
        pahm::launch(kernel, blocks, threads, shared_bytes, device(seed), arguments...);
    });
  }
};
#define KERNEL(name) const bool name##_is_a_case = simt::add_case(#name, Launch<&name>::call)
