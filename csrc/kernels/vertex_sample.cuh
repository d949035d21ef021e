// vertex_sample: maps (B, C_s, H_s, W_s), vertices (B, N, 3 or 2), camera -> (B, N, C_1 + ... + C_S).
// Both directions share this file: arguments, projection, and where a vertex lies on a map.
#pragma once

#include "kernels/common.cuh"

namespace pahm {

inline constexpr int most_maps = 16;

// A map without gaps, either planes (B, C, H, W) or channels_last (B, H, W, C).
template <typename S>
struct SampleMap {
  const S* data;  // (batch, channels, height, width), without gaps
  S* grad;        // laid out like data, or null if it is not needed
  int channels, height, width;
  int first_channel;   // in the output
  bool channels_last;  // the memory format of both; else NCHW
};

enum class Camera { none, weak, perspective };

template <typename S>
struct SampleArguments {
  using T = Sum<S>;
  SampleMap<S> maps[most_maps];
  int map_count;
  int64_t batch;
  int vertex_count;
  int channels;       // of all maps
  const T* vertices;  // (batch, vertex_count, 3); without a camera (.., 2) in normalised coordinates
  const T* camera;    // (batch, 3) [s, tx, ty], (batch, 3, 3) in pixels, or null
  Camera camera_kind;
  T scale[2], shift[2];  // pixels of a perspective camera to normalised coordinates: multiply, then add
  bool align_corners, border;
};

// Sets the size, in pixels, of the image that intrinsics describe.
template <typename S>
void set_image_size(SampleArguments<S>& a, int64_t height, int64_t width) {
  if (a.camera_kind != Camera::perspective) return;
  const int64_t size[2] = {width, height};
  for (int i = 0; i < 2; ++i) {
    a.scale[i] = Sum<S>(2) / static_cast<Sum<S>>(a.align_corners ? size[i] - 1 : size[i]);
    a.shift[i] = (a.align_corners ? Sum<S>(0) : 1 / static_cast<Sum<S>>(size[i])) - 1;
  }
}

// Blocks [first_block, first_block + blocks) of a launch work on one map of all items. Each kernel defines
// `x` and `y`.
struct MapBlocks {
  int64_t first_block;
  int x, y;
};
// How a launch is divided between maps.
struct MapPlan {
  MapBlocks maps[most_maps];
  int map_count;

  __device__ int find(unsigned block) const {
    int map = 0;
    while (map + 1 < map_count && block >= maps[map + 1].first_block) ++map;
    return map;
  }
  // A block's number among the blocks of its map.
  __device__ int block_of(int map, unsigned block) const {
    return static_cast<int>(block - static_cast<unsigned>(maps[map].first_block));
  }
};

template <typename T>
__device__ __forceinline__ bool finite(T x) {
  return x - x == 0;
}

// The same vertex is projected in several kernels and in several places of one kernel, and all must find it
// in the same cell. So `project` and `locate` round each product, and the compiler cannot vary the bits.

// A vertex, the camera of its batch item, and the results of the projection.
template <typename T>
struct Projected {
  T vertex[3], camera[9];
  T ray[3];    // the camera matrix times the vertex
  T point[2];  // normalised
  bool valid;  // false if a value is not finite or the vertex is behind a perspective camera
};

// The coordinates of vertex n; z is 0 if there is no z.
template <typename S>
__device__ __forceinline__ void load_vertex(const SampleArguments<S>& a, int64_t item, int n,
                                            Sum<S> (&v)[3]) {
  const int width = a.camera_kind == Camera::none ? 2 : 3;
#pragma unroll
  for (int i = 0; i < 3; ++i)
    v[i] = i < width ? load(a.vertices + (item * a.vertex_count + n) * width + i) : Sum<S>(0);
}

// The coordinates of 32 vertices, one per lane, in adjacent reads. All lanes of the warp must call this; a
// vertex beyond the last is 0.
template <typename S>
__device__ __forceinline__ void load_vertices(const SampleArguments<S>& a, int64_t item, int first,
                                              Sum<S> (&v)[3]) {
  using T = Sum<S>;
  const int lane = threadIdx.x % 32, width = a.camera_kind == Camera::none ? 2 : 3;
  const int numbers = (a.vertex_count - first < 32 ? a.vertex_count - first : 32) * width;
  T part[3];
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const int at = j * 32 + lane;
    part[j] = at < numbers ? load(a.vertices + (item * a.vertex_count + first) * width + at) : T(0);
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int at = lane * width + i;
    v[i] = 0;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const T found = shuffle(0xffffffff, part[j], at % 32);
      if (i < width && at / 32 == j) v[i] = found;
    }
  }
}

template <typename S>
__device__ Projected<Sum<S>> project(const SampleArguments<S>& a, int64_t item, const Sum<S> (&vertex)[3]) {
  using T = Sum<S>;
  Projected<T> p;
  const bool perspective = a.camera_kind == Camera::perspective;
  const int camera_size = perspective ? 9 : 3;
  p.valid = true;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    p.vertex[i] = vertex[i];
    p.valid &= finite(p.vertex[i]);
  }
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    p.camera[i] =
        a.camera_kind != Camera::none && i < camera_size ? load(a.camera + item * camera_size + i) : T(0);
    p.valid &= finite(p.camera[i]);
  }
  if (perspective) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      p.ray[i] = rounded_product(p.camera[3 * i], p.vertex[0]) +
                 rounded_product(p.camera[3 * i + 1], p.vertex[1]) +
                 rounded_product(p.camera[3 * i + 2], p.vertex[2]);
    }
    p.valid &= p.ray[2] > 0;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    p.point[i] = perspective ? rounded_product(p.ray[i] / p.ray[2], a.scale[i]) + a.shift[i]
                 : a.camera_kind == Camera::weak ? rounded_product(p.camera[0], p.vertex[i] + p.camera[1 + i])
                                                 : p.vertex[i];
    p.valid &= finite(p.point[i]);
  }
  return p;
}

// The cell of four pixels around a vertex, in the order (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1). Its
// pixels may lie outside the map, but by at most one.
template <typename T>
struct Cell {
  int x, y;
  T fx, fy;  // position inside the cell, in [0, 1)
  T dx, dy;  // pixels per unit of the normalised coordinate; 0 if the vertex was clamped to the border

  __device__ T weight(int k) const { return (k & 1 ? fx : 1 - fx) * (k & 2 ? fy : 1 - fy); }
  __device__ bool inside(int k, int height, int width) const {
    const int px = x + (k & 1), py = y + (k >> 1);
    return px >= 0 && px < width && py >= 0 && py < height;
  }
};

// From a normalised coordinate to pixels; false if no pixel is near.
template <typename S>
__device__ __forceinline__ bool to_pixels(const SampleArguments<S>& a, Sum<S> normalised, int size,
                                          Sum<S>& position, Sum<S>& slope) {
  using T = Sum<S>;
  const T extent = static_cast<T>(size), last = extent - 1;
  slope = (a.align_corners ? last : extent) / 2;
  position = a.align_corners ? rounded_product((normalised + 1) / 2, last)
                             : (rounded_product(normalised + 1, extent) - 1) / 2;
  if (!a.border) return position >= -1 && position < extent;
  if (!(position > 0)) {
    position = 0;
    slope = 0;
  } else if (!(position < last)) {
    position = last;
    slope = 0;
  }
  return true;
}

// False for a vertex that takes nothing from the map: invalid, or outside with zero padding.
template <typename S>
__device__ __forceinline__ bool locate(const SampleArguments<S>& a, const SampleMap<S>& map,
                                       const Projected<Sum<S>>& p, Cell<Sum<S>>& cell) {
  using T = Sum<S>;
  T x, y;
  if (!p.valid || !to_pixels(a, p.point[0], map.width, x, cell.dx) ||
      !to_pixels(a, p.point[1], map.height, y, cell.dy)) {
    return false;
  }
  const T x0 = floor(x), y0 = floor(y);
  // Beyond 2^24 floats skip pixels, and rounding may have moved a position past the map's end.
  const int cell_x = static_cast<int>(x0), cell_y = static_cast<int>(y0);
  cell.x = cell_x < map.width ? cell_x : map.width - 1;
  cell.y = cell_y < map.height ? cell_y : map.height - 1;
  cell.fx = x - x0;
  cell.fy = y - y0;
  return true;
}

}  // namespace pahm
