// mesh_pool: x (B, N, C), a CSR matrix (M, N) -> (B, M, C). The backward pass is the same with the transpose.
#pragma once

#include "kernels/common.cuh"

namespace pahm {

// V is float or double, whatever S is.
template <typename S, typename V>
struct MeshPoolArguments {
  const S* x;                   // (batch, vertices, channels)
  const int32_t* row_pointers;  // (rows + 1): where a row's entries begin
  const int32_t* columns;       // (entries): the vertex that an entry takes
  const V* values;              // (entries)
  S* out;                       // (batch, rows, channels)
  int64_t batch, rows, channels;
  int vertices, entries;
};

// A block handles a slab, which is `1 << lane_bits` packs of channels of one mesh, and `block_rows` rows of
// the matrix, so that its L1 cache fetches each row of x once.
struct MeshPoolPlan {
  int lane_bits, slabs, block_rows, row_blocks;
};

template <typename S, typename V, int Count>
__global__ void __launch_bounds__(block_threads, 4)
    mesh_pool_kernel(const __grid_constant__ MeshPoolArguments<S, V> a,
                     const __grid_constant__ MeshPoolPlan plan) {
  const int64_t row_block = blockIdx.x % plan.row_blocks, slab = blockIdx.x / plan.row_blocks % plan.slabs;
  const int64_t mesh = blockIdx.x / plan.row_blocks / plan.slabs;
  const int lane = threadIdx.x & ((1 << plan.lane_bits) - 1), step = block_threads >> plan.lane_bits;
  const int64_t channel = (slab << plan.lane_bits | lane) * Count;
  if (channel >= a.channels) return;
  const S* const source = a.x + mesh * a.vertices * a.channels + channel;
  S* const target = a.out + mesh * a.rows * a.channels + channel;
  const int64_t begin = row_block * plan.block_rows;
  const int64_t end = begin + plan.block_rows < a.rows ? begin + plan.block_rows : a.rows;
  for (int64_t row = begin + (threadIdx.x >> plan.lane_bits); row < end; row += step) {
    Sum<S> sum[Count] = {};
    const int32_t last = list_bound(load(a.row_pointers + row + 1), a.entries);
    for (int32_t e = list_bound(load(a.row_pointers + row), a.entries); e < last; ++e) {
      const auto value = static_cast<Sum<S>>(load(a.values + e));
      const int32_t column = load(a.columns + e);
      if (!is_index(column, a.vertices)) continue;
      const auto pack = load_pack<Count>(source + column * a.channels);
#pragma unroll
      for (int c = 0; c < Count; ++c) sum[c] += value * to_float(pack.values[c]);
    }
    store_sums(target + row * a.channels, sum);
  }
}

template <int Count, typename S, typename V>
void mesh_pool_launch(const MeshPoolArguments<S, V>& a, const Device& device) {
  const int64_t packs = a.channels / Count;
  const int lane_bits = bits_for(packs, 5);
  const int64_t slabs = ceil_div(packs, int64_t{1} << lane_bits), step = block_threads >> lane_bits;
  // As many rows as leave four blocks for each processor.
  const int64_t blocks = a.batch * slabs, wanted = ceil_div(4 * device.processors, blocks);
  const int64_t block_rows = step * ceil_div(a.rows, step * wanted),
                row_blocks = ceil_div(a.rows, block_rows);
  const MeshPoolPlan plan{lane_bits, static_cast<int>(slabs), static_cast<int>(block_rows),
                          static_cast<int>(row_blocks)};
  launch(mesh_pool_kernel<S, V, Count>, blocks * row_blocks, block_threads, 0, device, a, plan);
}

template <typename S, typename V>
void mesh_pool_launch(const MeshPoolArguments<S, V>& a, const Device& device) {
  if (a.batch * a.rows * a.channels == 0) return;
  constexpr int wide = 16 / sizeof(S);
  if (a.channels % wide == 0 && aligned(a.x) && aligned(a.out)) return mesh_pool_launch<wide>(a, device);
  mesh_pool_launch<1>(a, device);
}

}  // namespace pahm
