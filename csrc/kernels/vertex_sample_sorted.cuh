// vertex_sample's vertices sorted by cell, and which of them touch a pixel.
#pragma once

#include "kernels/vertex_sample_forward.cuh"

namespace pahm {

inline constexpr int tile_pixels = 32;

// Workspace. V: vertices of an item.
template <typename T>
struct SampleWorkspace {
  int32_t* cells;         // (B, maps, V) ascending
  int32_t* order;         // (B, maps, V) the vertices with those cells
  Pack<T, 2>* positions;  // (B, maps, V) fx, fy of those vertices inside their cells
  T* products;            // (slabs of all maps, B, V, 4); null if no point gradients are needed
};

template <typename S>
struct SampleBackwardArguments {
  using T = Sum<S>;
  SampleArguments<S> forward;
  const S* output_grad;
  T* vertex_grad;  // null if not needed
  T* camera_grad;  // null if not needed
  SampleWorkspace<T> work;
};

inline constexpr int32_t no_cell = 0x7fffffff;

// Cells are counted from (-1, -1).
template <typename T>
__device__ __forceinline__ int32_t cell_index(const Cell<T>& cell, int width) {
  return (cell.y + 1) * (width + 1) + cell.x + 1;
}

// A vertex's place is the number of vertices before it: no atomics, the same in every run.
template <typename S>
__global__ void __launch_bounds__(block_threads, 3)
    sort_vertices_kernel(const __grid_constant__ SampleArguments<S> a,
                         const __grid_constant__ SampleWorkspace<Sum<S>> work, int tiles) {
  using T = Sum<S>;
  PAHM_SHARED(int32_t, cells, block_threads);
  const int index = blockIdx.x / tiles % a.map_count, thread = threadIdx.x;
  const int64_t item = blockIdx.x / tiles / a.map_count;
  const SampleMap<S>& map = a.maps[index];
  const auto cell_of = [&](int n, Cell<T>& cell) {
    T vertex[3];
    load_vertices(a, item, n - thread % 32, vertex);
    return n < a.vertex_count && locate(a, map, project(a, item, vertex), cell) ? cell_index(cell, map.width)
                                                                                : no_cell;
  };
  const int n = blockIdx.x % tiles * block_threads + thread;
  Cell<T> own{};
  const int32_t own_cell = cell_of(n, own);
  int rank = 0;
  for (int base = 0; base < a.vertex_count; base += block_threads) {
    Cell<T> other;
    cells[thread] = cell_of(base + thread, other);
    __syncthreads();
    for (int i = 0; i < block_threads && base + i < a.vertex_count; ++i) {
      const int32_t cell = cells[i];
      rank += cell < own_cell || (cell == own_cell && base + i < n);
    }
    __syncthreads();
  }
  if (n >= a.vertex_count) return;
  const int64_t place = (item * a.map_count + index) * a.vertex_count + rank;
  store(work.cells + place, own_cell);
  store(work.order + place, static_cast<int32_t>(n));
  store(work.positions + place, Pack<T, 2>{{own.fx, own.fy}});
}

// The number of sorted cells below `cell`.
__device__ __forceinline__ int cells_below(const int32_t* cells, int count, int32_t cell) {
  int begin = 0;
  while (count > 0) {
    const int half = count / 2;
    if (load(cells + begin + half) < cell) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return begin;
}

// Which sorted vertices touch each pixel p of a tile. The vertices in the two cells above the pixel are
// [ranges[4 p], ranges[4 p + 1]); the next two numbers of ranges are for the two cells below it.
template <typename S, typename Ranges>
__device__ __forceinline__ void find_ranges(const SampleMap<S>& map, const int32_t* cells, int vertex_count,
                                            int first_pixel, Ranges& ranges) {
  if (threadIdx.x < 4 * tile_pixels) {
    const int pixel = first_pixel + threadIdx.x / 4, row = threadIdx.x / 2 % 2, end = threadIdx.x % 2;
    const int32_t cell = (pixel / map.width + row) * (map.width + 1) + pixel % map.width + 2 * end;
    ranges[threadIdx.x] = pixel < map.height * map.width ? cells_below(cells, vertex_count, cell) : 0;
  }
  __syncthreads();
}

// One vertex that touches a pixel.
template <typename T>
struct Touch {
  int vertex, corner;  // corner: which of the vertex's four pixels it is
  T weight;
};

template <typename T>
__device__ __forceinline__ Touch<T> touch(const SampleWorkspace<T>& work, int64_t place, int row,
                                          int32_t right_cell) {
  const Pack<T, 2> position = load(work.positions + place);
  const bool left = load(work.cells + place) == right_cell;
  const T wx = left ? 1 - position.values[0] : position.values[0];
  const T wy = row == 0 ? position.values[1] : 1 - position.values[1];
  return {load(work.order + place), (row == 0 ? 2 : 0) + (left ? 0 : 1), wx * wy};
}

}  // namespace pahm
