// vertex_sample's vertices sorted by cell, and which of them touch a pixel.
#pragma once

#include "kernels/vertex_sample_forward.cuh"

namespace pahm {

inline constexpr int tile_pixels = 32;

// Vertices in the order of their cells. V: vertices of an item.
struct SortedVertices {
  int32_t* cells;     // (B, maps, V) ascending
  int32_t* vertices;  // (B, maps, V) the vertices with those cells; ascending within a cell
};

template <typename T>
struct SampleWorkspace {
  SortedVertices sorted;
  SortedVertices spare;   // between two merges; null if an item has no more vertices than a chunk
  Pack<T, 2>* positions;  // (B, maps, V) fx, fy of the sorted vertices inside their cells
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

// Above every cell, and one below the largest number.
inline constexpr int32_t no_cell = 0x7ffffffe;

// Cells are counted from (-1, -1).
template <typename T>
__device__ __forceinline__ int32_t cell_index(const Cell<T>& cell, int width) {
  return (cell.y + 1) * (width + 1) + cell.x + 1;
}

// How many of `count` ascending numbers are below `value`; read(i) gives the i-th.
template <typename Read>
__device__ __forceinline__ int count_below(int count, int32_t value, const Read& read) {
  int begin = 0;
  while (count > 0) {
    const int half = count / 2;
    if (read(begin + half) < value) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return begin;
}

// ---- sorting: a stable merge sort, without atomics, so the order is the same in every run ----

// Vertices that a block sorts in shared memory. Further launches merge the chunks of larger meshes.
inline constexpr int chunk_rounds = 4, sort_chunk = chunk_rounds * block_threads;

// Where entry i, `value`, goes when each two neighbouring runs of `run` entries merge. `run` is a power of
// two; the last runs may be shorter or absent. Of equal entries the one that comes first stays first.
template <typename Read>
__device__ __forceinline__ int merged_place(int i, int run, int count, int32_t value, const Read& read) {
  const int own = i & ~(run - 1), other = own ^ run, left = count - other;
  const int others = left < 0 ? 0 : left < run ? left : run;
  const int before =
      count_below(others, own < other ? value : value + 1, [&](int j) -> int32_t { return read(other + j); });
  return (own & ~run) + (i - own) + before;
}

// `last`: no merge follows, so the vertex's position inside its cell belongs at this place too.
template <typename S>
__device__ __forceinline__ void store_sorted(const SampleArguments<S>& a, const SampleWorkspace<Sum<S>>& work,
                                             const SortedVertices& to, int64_t item, int index, int place,
                                             int32_t cell, int32_t n, bool last) {
  using T = Sum<S>;
  const int64_t at = (item * a.map_count + index) * a.vertex_count + place;
  store(to.cells + at, cell);
  store(to.vertices + at, n);
  if (!last || cell == no_cell) return;
  T vertex[3];
  load_vertex(a, item, n, vertex);
  Cell<T> found{};
  locate(a, a.maps[index], project(a, item, vertex), found);
  store(work.positions + at, Pack<T, 2>{{found.fx, found.fy}});
}

// A block sorts a chunk of the vertices of an item and a map.
template <typename S>
__global__ void __launch_bounds__(block_threads, 4)
    sort_vertices_kernel(const __grid_constant__ SampleArguments<S> a,
                         const __grid_constant__ SampleWorkspace<Sum<S>> work,
                         const __grid_constant__ SortedVertices to, int chunks) {
  using T = Sum<S>;
  PAHM_SHARED(int32_t, cells, sort_chunk);
  PAHM_SHARED(int32_t, vertices, sort_chunk);
  const int index = blockIdx.x / chunks % a.map_count, thread = threadIdx.x;
  const int64_t item = blockIdx.x / chunks / a.map_count;
  const SampleMap<S>& map = a.maps[index];
  const int first = blockIdx.x % chunks * sort_chunk;
  const int count = a.vertex_count - first < sort_chunk ? a.vertex_count - first : sort_chunk;

  for (int i = thread; i - thread < count; i += block_threads) {
    T vertex[3];
    load_vertices(a, item, first + i - thread % 32, vertex);
    if (i >= count) continue;
    Cell<T> cell;
    const bool found = locate(a, map, project(a, item, vertex), cell);
    cells[i] = found ? cell_index(cell, map.width) : no_cell;
    vertices[i] = first + i;
  }
  __syncthreads();
  for (int run = 1; run < count; run *= 2) {
    int32_t cell[chunk_rounds], n[chunk_rounds];
    int place[chunk_rounds];
#pragma unroll
    for (int k = 0; k < chunk_rounds; ++k) {
      const int i = k * block_threads + thread;
      if (i >= count) continue;
      cell[k] = cells[i];
      n[k] = vertices[i];
      place[k] = merged_place(i, run, count, cell[k], [&](int j) -> int32_t { return cells[j]; });
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < chunk_rounds; ++k) {
      if (k * block_threads + thread >= count) continue;
      cells[place[k]] = cell[k];
      vertices[place[k]] = n[k];
    }
    __syncthreads();
  }
  for (int i = thread; i < count; i += block_threads)
    store_sorted(a, work, to, item, index, first + i, cells[i], vertices[i], chunks == 1);
}

// Merges each two neighbouring runs of `run` sorted vertices; a thread moves one vertex.
template <typename S>
__global__ void __launch_bounds__(block_threads, 4)
    merge_vertices_kernel(const __grid_constant__ SampleArguments<S> a,
                          const __grid_constant__ SampleWorkspace<Sum<S>> work,
                          const __grid_constant__ SortedVertices from,
                          const __grid_constant__ SortedVertices to, int run, int tiles, bool last) {
  const int index = blockIdx.x / tiles % a.map_count;
  const int64_t item = blockIdx.x / tiles / a.map_count;
  const int i = blockIdx.x % tiles * block_threads + threadIdx.x;
  if (i >= a.vertex_count) return;
  const int64_t base = (item * a.map_count + index) * a.vertex_count;
  const int32_t cell = load(from.cells + base + i);
  const int place = merged_place(i, run, a.vertex_count, cell,
                                 [&](int j) -> int32_t { return load(from.cells + base + j); });
  store_sorted(a, work, to, item, index, place, cell, load(from.vertices + base + i), last);
}

template <typename S>
void sort_vertices_launch(const SampleArguments<S>& a, const SampleWorkspace<Sum<S>>& work,
                          const Device& device) {
  int64_t run = sort_chunk;
  bool spare = false;  // whether the next launch fills the spare, so that the last one does not
  for (; run < a.vertex_count; run *= 2) spare = !spare;
  const int64_t count = a.vertex_count, lists = a.batch * a.map_count;
  const int64_t chunks = ceil_div(count, sort_chunk), tiles = ceil_div(count, block_threads);
  launch(sort_vertices_kernel<S>, lists * chunks, block_threads, 0, device, a, work,
         spare ? work.spare : work.sorted, static_cast<int>(chunks));
  for (run = sort_chunk; run < count; run *= 2, spare = !spare) {
    launch(merge_vertices_kernel<S>, lists * tiles, block_threads, 0, device, a, work,
           spare ? work.spare : work.sorted, spare ? work.sorted : work.spare, static_cast<int>(run),
           static_cast<int>(tiles), 2 * run >= count);
  }
}

// ---- the vertices of a pixel ----

// Which sorted vertices touch each pixel p of a tile. The vertices in the two cells above the pixel are
// [ranges[4 p], ranges[4 p + 1]); the next two numbers of ranges are for the two cells below it.
template <typename S, typename Ranges>
__device__ __forceinline__ void find_ranges(const SampleMap<S>& map, const int32_t* cells, int vertex_count,
                                            int first_pixel, Ranges& ranges) {
  if (threadIdx.x < 4 * tile_pixels) {
    const int pixel = first_pixel + threadIdx.x / 4, row = threadIdx.x / 2 % 2, end = threadIdx.x % 2;
    const int32_t cell = (pixel / map.width + row) * (map.width + 1) + pixel % map.width + 2 * end;
    const auto read = [&](int i) { return load(cells + i); };
    ranges[threadIdx.x] = pixel < map.height * map.width ? count_below(vertex_count, cell, read) : 0;
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
  const bool left = load(work.sorted.cells + place) == right_cell;
  const T wx = left ? 1 - position.values[0] : position.values[0];
  const T wy = row == 0 ? position.values[1] : 1 - position.values[1];
  return {load(work.sorted.vertices + place), (row == 0 ? 2 : 0) + (left ? 0 : 1), wx * wy};
}

}  // namespace pahm
