// The few names of the CUDA runtime that csrc/cuda uses, for tests/simt/cuda_layer.cpp.
#pragma once

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

// The machine takes a number as its stream.
struct cudaStream_t {
  explicit cudaStream_t(void*) {}
  operator int() const { return 0; }
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 227 * 1024;
  return cudaSuccess;
}
