// The ops of csrc/cuda as a GPU's users call them, on tensors of the CPU: checks, allocations and launches
// are the real ones, and the kernels run in the machine of simt.h. Loading this library replaces the CPU's
// kernels. For tests/helpers/cuda_layer.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "kernels/device.cuh"

namespace {

// Kernels may touch the memory that the op asks a tensor for.
AOTITorchError allow(AtenTensorHandle tensor, const void* data) {
  int64_t count = 0;
  int32_t type = 0;
  aoti_torch_get_numel(tensor, &count);
  aoti_torch_get_dtype(tensor, &type);
  simt::Machine::get().allow(data, static_cast<size_t>(count) * aoti_torch_dtype_element_size(type));
  return 0;
}

AOTITorchError const_data(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = torch_get_const_data_ptr(tensor, data);
  return error ? error : allow(tensor, *data);
}

AOTITorchError mutable_data(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = torch_get_mutable_data_ptr(tensor, data);
  return error ? error : allow(tensor, *data);
}

// An op enters its device before it asks for memory.
AOTITorchError enter_device(int32_t, DeviceGuardHandle* guard) {
  simt::Machine::get().forget_buffers();
  *guard = nullptr;
  return 0;
}

int64_t allocations = 0;

AOTITorchError allocate(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t type,
                        int32_t device_type, int32_t device_index, AtenTensorHandle* tensor) {
  ++allocations;
  return aoti_torch_empty_strided(rank, sizes, strides, type, device_type, device_index, tensor);
}

AOTITorchError leave_device(DeviceGuardHandle) { return 0; }

AOTITorchError current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // namespace

// How often memory was asked for so far. On a GPU each time crosses the dispatcher, on the CPU it does not.
extern "C" __attribute__((visibility("default"))) int64_t pahm_allocations() { return allocations; }

#define aoti_torch_empty_strided allocate
#define torch_get_const_data_ptr const_data
#define torch_get_mutable_data_ptr mutable_data
#define aoti_torch_create_device_guard enter_device
#define aoti_torch_delete_device_guard leave_device
#define aoti_torch_get_current_cuda_stream current_stream
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu

#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"

// The key that the ops are registered for.
#define CUDA CPU

#include "../../csrc/cuda/mesh_pool.cu"
#include "../../csrc/cuda/spiral_conv.cu"
#include "../../csrc/cuda/vertex_sample.cu"
