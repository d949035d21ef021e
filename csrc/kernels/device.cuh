// The few things that kernels do with the device, so that the same kernel also runs on a CPU, where they are
// watched and counted (tests/simt). Kernels reach global memory through load, store and atomic_add alone.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// An array of `count` elements of T that the threads of a block share.
#define PAHM_SHARED(T, name, count) __shared__ T name[count]

namespace pahm {

using half = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }

template <typename S>
struct FromFloat {
  __device__ static S convert(S x) { return x; }
};
template <>
struct FromFloat<half> {
  __device__ static half convert(float x) { return __float2half_rn(x); }
};
template <>
struct FromFloat<bfloat16> {
  __device__ static bfloat16 convert(float x) { return __float2bfloat16_rn(x); }
};
template <typename S, typename T>
__device__ __forceinline__ S from_float(T x) {
  return FromFloat<S>::convert(x);
}

// A type of 16 bytes is moved by one instruction.
template <typename T>
__device__ __forceinline__ T load(const T* address) {
  if constexpr (sizeof(T) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return *address;
  }
}

template <typename T>
__device__ __forceinline__ void store(T* address, T value) {
  if constexpr (sizeof(T) == 16) {
    uint4 bits;
    memcpy(&bits, &value, sizeof bits);
    *reinterpret_cast<uint4*>(address) = bits;
  } else {
    *address = value;
  }
}

template <typename T>
__device__ __forceinline__ void atomic_add(T* address, T value) {
  atomicAdd(address, value);
}

template <typename T>
__device__ __forceinline__ T shuffle(uint32_t mask, T value, int lane) {
  return __shfl_sync(mask, value, lane);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(uint32_t mask, T value, int lanes) {
  return __shfl_xor_sync(mask, value, lanes);
}
__device__ __forceinline__ uint32_t ballot(uint32_t mask, bool predicate) {
  return __ballot_sync(mask, predicate);
}

}  // namespace pahm

#else
#include "device_on_cpu.h"
#endif

namespace pahm {

// What memory of type S is summed in.
template <typename S>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename S>
using Sum = typename SumOf<S>::type;

// `Count` numbers that are moved together.
template <typename S, int Count>
struct alignas(sizeof(S) * Count) Pack {
  S values[Count];
};

}  // namespace pahm
