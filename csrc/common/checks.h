// What memory safety needs. Meaning is checked in Python, which also words it for people.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pahm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Kernels throw std::exceptions to libtorch. The stable ABI is made for that: what TORCH_BOX wraps around a
// kernel throws by itself (STD_TORCH_CHECK in torch/csrc/stable/library.h), in every version that has it.

// The Python side sees ValueError.
inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// The Python side sees IndexError.
inline void check_range(const Tensor& indices, int64_t limit, const char* name) {
  const int64_t* p = indices.const_data_ptr<int64_t>();
  int64_t low = 0, high = -1;
  for (int64_t i = 0, n = indices.numel(); i < n; ++i) {
    low = std::min(low, p[i]);
    high = std::max(high, p[i]);
  }
  if (low < 0 || high >= limit) {
    throw std::out_of_range(std::string(name) + " must lie in [0, " + std::to_string(limit) + "), got " +
                            std::to_string(low < 0 ? low : high));
  }
}

// The product of sizes, which tensors whose elements share memory may have far too large.
inline int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
  check(!__builtin_mul_overflow(a, b, &result), "sizes must have a product below 2^63");
  return result;
}

inline void check_same_type(const Tensor& a, const Tensor& b, const char* name) {
  check(a.scalar_type() == b.scalar_type(), std::string(name) + " has another dtype than the first tensor");
}

inline void check_cpu(const Tensor& t, const char* name) {
  check(t.is_cpu(), std::string(name) + " must be on the CPU");
}

// torch's own, without a call through its dispatcher where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor of_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// An int64 table on the CPU, contiguous.
inline Tensor index_table(const Tensor& t, int64_t dims, const char* name) {
  check_cpu(t, name);
  check(t.dim() == dims && t.scalar_type() == ScalarType::Long,
        std::string(name) + " must be int64 of rank " + std::to_string(dims));
  return as_contiguous(t);
}

}  // namespace pahm
