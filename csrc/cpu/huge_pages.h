// Huge pages for large results.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/checks.h"

namespace pahm {

// Asks for huge pages where a new tensor covers whole ones. An allocator gives large memory back to the
// system, so each call gets it anew, and with small pages the faults take longer than the work. This is a
// hint: where the system refuses it, the pages stay small.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = data + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t first = (data + page - 1) / page * page, last = end / page * page;
  if (first < last) static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#endif
}

}  // namespace pahm
