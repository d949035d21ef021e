// Whether the kernels of this library run on a device.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"

namespace pahm {
namespace {

__global__ void nothing() {}

// False if the library has no code for the device, or the driver is older than the CUDA of the build.
bool cuda_runs(int64_t device) {
  int count = 0;
  bool runs = cudaGetDeviceCount(&count) == cudaSuccess && device >= 0 && device < count;
  if (runs) {
    // As in OnDeviceOf, but here an error means "no".
    const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
    cudaFuncAttributes attributes;
    runs = cudaSetDevice(static_cast<int>(device)) == cudaSuccess &&
           cudaFuncGetAttributes(&attributes, nothing) == cudaSuccess;
  }
  cudaGetLastError();  // Clears the error, which the next launch would otherwise report.
  return runs;
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CompositeExplicitAutograd, m) {
  m.impl("_cuda_runs", TORCH_BOX(&pahm::cuda_runs));
}
