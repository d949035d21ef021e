// mesh_pool: x (B, N, C), a CSR matrix (M, N) -> (B, M, C). The backward is the same with the transpose.
#pragma once

#include "kernels/device.cuh"

namespace pahm {

inline constexpr int mesh_pool_threads = 256;

// A thread has `Count` neighbouring channels of one output row, so that the lanes of a warp read and write
// memory side by side, over the ends of rows. C is a multiple of `Count`.
template <typename S, int Count>
__global__ void __launch_bounds__(mesh_pool_threads)
    mesh_pool_kernel(const S* x, const int32_t* row_pointers, const int32_t* columns, const Sum<S>* values,
                     S* out, int64_t batch, int64_t vertices, int64_t rows, int64_t channels) {
  const int64_t packs = channels / Count, work = batch * rows * packs;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < work; i += stride) {
    const int64_t row = i / packs, channel = i % packs * Count, mesh = row / rows, m = row % rows;
    const S* const source = x + mesh * vertices * channels + channel;
    Sum<S> sum[Count] = {};
    const int32_t last = load(row_pointers + m + 1);
    for (int32_t e = load(row_pointers + m); e < last; ++e) {
      const Sum<S> value = load(values + e);
      const int64_t column = load(columns + e);
      const auto pack = load(reinterpret_cast<const Pack<S, Count>*>(source + column * channels));
#pragma unroll
      for (int c = 0; c < Count; ++c) sum[c] += value * to_float(pack.values[c]);
    }
    Pack<S, Count> result;
#pragma unroll
    for (int c = 0; c < Count; ++c) result.values[c] = from_float<S>(sum[c]);
    store(reinterpret_cast<Pack<S, Count>*>(out + row * channels + channel), result);
  }
}

}  // namespace pahm
