// Helpers between tensors on a GPU and the launches of csrc/kernels: checks, the device and the stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "common/checks.h"
#include "kernels/common.cuh"

namespace pahm {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return t.is_cpu() ? "cpu" : "another kind of device";
}

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

// For sizes that kernels count in an int.
inline void check_small(const char* name, int64_t size) {
  check(size <= most_size, [&] {
    return std::string(name) + " must be at most " + std::to_string(most_size) + ", got " +
           std::to_string(size);
  });
}

inline void check_rank(const Tensor& t, int64_t dims, const char* name) {
  check(t.dim() == dims, [&] {
    return std::string(name) + " must have rank " + std::to_string(dims) + ", got " + std::to_string(t.dim());
  });
}

inline void check_floating(const Tensor& x, int64_t dims, const char* name) {
  check(x.is_cuda(), [&] { return std::string(name) + " must be on a CUDA device, got " + device_name(x); });
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
            type == ScalarType::BFloat16,
        [&] {
          return std::string(name) + " must be float32, float64, float16 or bfloat16, got " +
                 dtype_name(type);
        });
  check_rank(x, dims, name);
}

// The tensor that all others must match, contiguous.
inline Tensor first_operand(const Tensor& x, int64_t dims, const char* name) {
  check_floating(x, dims, name);
  return as_contiguous(x);
}

inline void check_device(const Tensor& t, const Tensor& first, const char* name) {
  check(t.is_cuda() && t.get_device_index() == first.get_device_index(),
        [&] { return std::string(name) + " must be on " + device_name(first) + ", got " + device_name(t); });
}

// Another tensor, contiguous, with this dtype and rank, on the device of the first.
inline Tensor operand(const Tensor& t, const Tensor& first, ScalarType type, int64_t dims, const char* name) {
  check_device(t, first, name);
  check(t.scalar_type() == type, [&] {
    return std::string(name) + " must be " + dtype_name(type) + ", got " + dtype_name(t.scalar_type());
  });
  check_rank(t, dims, name);
  return as_contiguous(t);
}

// The memory of a tensor whose dtype was checked.
template <typename T>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Makes the device of `x` current until the end of the scope, and holds what launches need to know about it.
//
// This library links its own CUDA runtime, and torch has another. Torch's guard sets and restores the current
// device of torch's runtime. Our runtime is used only within such scopes, so its device is set but not
// restored. It must be set: kernels on a default stream and their attributes use our runtime's current
// device, whatever torch's is.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    const int32_t index = x.get_device_index();
    check(cudaSetDevice(index));
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    int shared_limit = 0;
    check(cudaDeviceGetAttribute(&device_.processors, cudaDevAttrMultiProcessorCount, index));
    check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    device_.stream = static_cast<cudaStream_t>(stream);
    device_.shared_limit = shared_limit;
  }
  const Device& device() const { return device_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_{};
};

}  // namespace pahm
