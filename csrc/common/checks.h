// Prepares tensors for the kernels of the CPU and GPUs, and checks what memory safety needs. Python checks
// the meaning of arguments and words those errors for people.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dispatch.h"

namespace pahm {

using torch::stable::Tensor;

// Kernels throw std::exceptions to libtorch. The stable ABI allows that: the code that TORCH_BOX wraps around
// a kernel itself throws (STD_TORCH_CHECK in torch/csrc/stable/library.h), in every version that has it.

// Python sees a ValueError with the message, which is a text or a function that is called only if needed.
template <typename Message>
void check(bool condition, const Message& message) {
  if (condition) return;
  if constexpr (std::is_invocable_v<Message>) {
    throw std::invalid_argument(message());
  } else {
    throw std::invalid_argument(message);
  }
}

// The product of sizes. It may overflow for tensors whose elements share memory.
inline int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
  check(!__builtin_mul_overflow(a, b, &result), "sizes must have a product below 2^63");
  return result;
}

// Like torch's own, but without a call through the dispatcher if there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor of_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// An uninitialised tensor on the device of `like`. torch::stable::new_empty and empty_like look up their op
// by name at every call, which takes longer than a small kernel, and cross the dispatcher twice.
inline Tensor empty_strided(const Tensor& like, int64_t rank, const int64_t* sizes, const int64_t* strides,
                            ScalarType type) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// The same, contiguous.
template <size_t Rank>
Tensor new_empty(const Tensor& like, const std::array<int64_t, Rank>& sizes, ScalarType type) {
  std::array<int64_t, Rank> strides;
  int64_t count = 1;
  for (size_t d = Rank; d-- > 0;) {
    strides[d] = count;
    count = product(count, sizes[d] > 1 ? sizes[d] : 1);
  }
  return empty_strided(like, Rank, sizes.data(), strides.data(), type);
}
template <size_t Rank>
Tensor new_empty(const Tensor& like, const std::array<int64_t, Rank>& sizes) {
  return new_empty(like, sizes, like.scalar_type());
}

}  // namespace pahm
