// Checks of the ops' tensors on the CPU.
#pragma once

#include <algorithm>

#include "common/checks.h"

namespace pahm {

inline void check_cpu(const Tensor& t, const char* name) {
  check(t.is_cpu(), [&] { return std::string(name) + " must be on the CPU"; });
}

inline void check_same_type(const Tensor& a, const Tensor& b, const char* name) {
  check(a.scalar_type() == b.scalar_type(),
        [&] { return std::string(name) + " has another dtype than the first tensor"; });
}

// An int32 table, contiguous.
inline Tensor index_table(const Tensor& t, int64_t dims, const char* name) {
  check_cpu(t, name);
  check(t.dim() == dims && t.scalar_type() == ScalarType::Int,
        [&] { return std::string(name) + " must be int32 of rank " + std::to_string(dims); });
  return as_contiguous(t);
}

// Python sees an IndexError. Each call checks again, because the caller owns a table's memory.
inline void check_range(const Tensor& indices, int64_t limit, const char* name) {
  const int32_t* p = indices.const_data_ptr<int32_t>();
  int32_t low = 0, high = -1;
  for (int64_t i = 0, n = indices.numel(); i < n; ++i) {
    low = std::min(low, p[i]);
    high = std::max(high, p[i]);
  }
  if (low < 0 || high >= limit) {
    throw std::out_of_range(std::string(name) + " must lie in [0, " + std::to_string(limit) + "), got " +
                            std::to_string(low < 0 ? low : high));
  }
}

}  // namespace pahm
