// The few operations that kernels do on the device. With other definitions the same kernel runs on a CPU,
// where tests/simt checks and counts its accesses. Kernels access global memory only by load, store and
// atomic_add.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace pahm {

// The type in which memory of type S is summed.
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

#if defined(__CUDACC__)
using Stream = cudaStream_t;
#else
using Stream = int;  // the seed of the order in which threads run
#endif

// Where a kernel is launched.
struct Device {
  Stream stream;
  int processors;
  int64_t shared_limit;  // bytes of shared memory that a block may have
};

inline void check_grid(int64_t blocks) {
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument("a grid of " + std::to_string(blocks) +
                                " blocks: at most 2147483647 are possible");
  }
}

template <typename T>
inline constexpr bool has_atomic_add =
    std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int>;

}  // namespace pahm

#if defined(__CUDACC__)

// An array of `count` elements of T that the threads of a block share.
#define PAHM_SHARED(T, name, count) __shared__ __align__(16) T name[count]

// The same with the size given to launch(); a kernel may have one.
#define PAHM_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char pahm_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(pahm_dynamic_shared)

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

// A product that is always rounded. The compiler may fuse other products with a sum, in one place of the
// source and not in another.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// ---- global memory ----

// One instruction moves a type of 16 bytes. It reads through the read-only cache, so 16-byte loads may not
// read memory that the same launch writes.
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
    // The compiler may split a plain assignment.
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
                 "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  } else {
    *address = value;
  }
}

template <typename T>
__device__ __forceinline__ void atomic_add(T* address, T value) {
  static_assert(has_atomic_add<T>);
  atomicAdd(address, value);
}

// ---- shared memory ----

// Elements i to i + Count - 1, side by side; i is a multiple of Count.
template <int Count, typename T>
__device__ __forceinline__ Pack<T, Count> load_shared(const T* array, int i) {
  Pack<T, Count> pack;
  if constexpr (sizeof pack == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(array + i);
    memcpy(&pack, &bits, sizeof pack);
  } else {
    pack = *reinterpret_cast<const Pack<T, Count>*>(array + i);
  }
  return pack;
}

template <int Count, typename T>
__device__ __forceinline__ void store_shared(T* array, int i, Pack<T, Count> pack) {
  if constexpr (sizeof pack == 16) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    *reinterpret_cast<uint4*>(array + i) = bits;
  } else {
    *reinterpret_cast<Pack<T, Count>*>(array + i) = pack;
  }
}

__device__ __forceinline__ void shared_atomic_min(int32_t* array, int i, int32_t value) {
  atomicMin(array + i, value);
}
__device__ __forceinline__ void shared_atomic_max(int32_t* array, int i, int32_t value) {
  atomicMax(array + i, value);
}

// ---- between the lanes of a warp ----

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

// ---- the host's side ----

// Runs a kernel on `blocks` blocks of `threads` threads, each block with `shared_bytes` of dynamic shared
// memory. Throws std::invalid_argument if the grid is too large, std::runtime_error if CUDA fails.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, const Device& device,
            A&&... arguments) {
  check_grid(blocks);
  if (blocks == 0) return;
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  };
  const auto grid = static_cast<unsigned>(blocks), block = static_cast<unsigned>(threads);
  const auto bytes = static_cast<size_t>(shared_bytes);
  // A kernel needs permission for more than 48 KiB, static arrays included. Always ask for the maximum:
  // another thread may launch the same kernel with less.
  constexpr int64_t room_for_static = 16 * 1024;
  if (shared_bytes + room_for_static > 48 * 1024) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel));
    const auto most = device.shared_limit - static_cast<int64_t>(attributes.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)));
  }
  kernel<<<grid, block, bytes, device.stream>>>(std::forward<A>(arguments)...);
  check(cudaGetLastError());
}

}  // namespace pahm

#else
#include "device_on_cpu.h"
#endif
