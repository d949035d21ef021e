// Code that the launches and the kernels of all ops share.
#pragma once

#include "common/ceil_div.h"
#include "kernels/device.cuh"

namespace pahm {

inline constexpr int block_threads = 256;

// The least number of bits, at most `most`, that can count to `size`.
inline int bits_for(int64_t size, int most) {
  int bits = 0;
  while (bits < most && (int64_t{1} << bits) < size) ++bits;
  return bits;
}

// The largest size that kernels count in an int: rounded up to whole blocks, it still fits.
inline constexpr int64_t most_size = 0x7fffffff - 1024;

// Kernels do not trust tables: whatever numbers a table holds, no access leaves the tensors. An index that is
// not in [0, `count`) is ignored.
__device__ __forceinline__ bool is_index(int32_t value, int count) {
  return static_cast<uint32_t>(value) < static_cast<uint32_t>(count);
}
// Where a list begins or ends in an array of `count` numbers; the array's end if the value is invalid.
__device__ __forceinline__ int32_t list_bound(int32_t value, int count) {
  return is_index(value, count) ? value : count;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// When kernels run on a CPU, each access is identified by its place in the source.
#if defined(__CUDACC__)
#define PAHM_PLACE_PARAMETER
#define PAHM_PLACE_ARGUMENT
#else
#define PAHM_PLACE_PARAMETER , Place place = Place::current()
#define PAHM_PLACE_ARGUMENT , place
#endif

template <int Count, typename S>
__device__ __forceinline__ Pack<S, Count> load_pack(const S* address PAHM_PLACE_PARAMETER) {
  return load(reinterpret_cast<const Pack<S, Count>*>(address) PAHM_PLACE_ARGUMENT);
}

// Rounds `Count` sums and stores them side by side.
template <typename S, int Count>
__device__ __forceinline__ void store_sums(S* address, const Sum<S> (&sums)[Count] PAHM_PLACE_PARAMETER) {
  Pack<S, Count> pack;
#pragma unroll
  for (int c = 0; c < Count; ++c) pack.values[c] = from_float<S>(sums[c]);
  store(reinterpret_cast<Pack<S, Count>*>(address), pack PAHM_PLACE_ARGUMENT);
}

}  // namespace pahm
