// vertex_sample, backward, without atomics: the result has the same bits in every run.
//
// - sort_vertices_kernel and merge_vertices_kernel sort the vertices of each item and map by cell.
// - pixel_grads_kernel (channels_last) and plane_grads_kernel (planes) assign each pixel to a group of lanes.
//   The group sums the contributions of the vertices in the four cells around the pixel and stores the
//   pixel's gradient once. For each vertex it also stores the product of its output gradient and the pixel,
//   so one pass over the output gradients is enough.
// - point_grads_kernel propagates those products back through the projection.
#pragma once

#include "kernels/vertex_sample_sorted.cuh"

namespace pahm {

// The first of a map's slabs of products, and their number.
struct MapSlabs {
  int first[most_maps], count[most_maps];
};

// ---- gradients of maps ----

// The pixels of a group of lanes: each lane has `Groups` packs of channels, `group_stride` channels apart.
template <typename S, int Count, int Groups>
struct PixelSums {
  using T = Sum<S>;
  T pixel[Groups][Count], sum[Groups][Count];

  // Sums over the vertices that touch the pixel, which `lanes` adjacent lanes share.
  template <typename Ranges>
  __device__ __forceinline__ void gather(const SampleBackwardArguments<S>& b, const SampleMap<S>& map,
                                         int64_t item, int index, int pixel_index, int pixel_in_tile,
                                         Ranges& ranges, int channel, int group_stride, int lanes,
                                         T* products) {
    const SampleArguments<S>& a = b.forward;
    const int64_t base = (item * a.map_count + index) * a.vertex_count;
    const int lane = threadIdx.x % 32, first_lane = lane & ~(lanes - 1);
    const uint32_t mask = lanes == 32 ? 0xffffffff : ((1u << lanes) - 1) << first_lane;
    const int32_t right_cell = pixel_index / map.width * (map.width + 1) + pixel_index % map.width + 1;
    for (int row = 0; row < 2; ++row) {
      const int end = ranges[4 * pixel_in_tile + 2 * row + 1];
      for (int e = ranges[4 * pixel_in_tile + 2 * row]; e < end; ++e) {
        const Touch<T> t = touch(b.work, base + e, row, right_cell + row * (map.width + 1));
        const S* const grad =
            b.output_grad + (item * a.vertex_count + t.vertex) * a.channels + map.first_channel;
        T product = 0;
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          const int c0 = channel + g * group_stride;
          if (c0 >= map.channels) continue;
          const auto pack = load_pack<Count>(grad + c0);
#pragma unroll
          for (int c = 0; c < Count; ++c) {
            sum[g][c] += t.weight * to_float(pack.values[c]);
            product += pixel[g][c] * to_float(pack.values[c]);
          }
        }
        if (products == nullptr) continue;
        for (int distance = lanes / 2; distance > 0; distance /= 2)
          product += shuffle_xor(mask, product, distance);
        if (lane == first_lane) store(products + (item * a.vertex_count + t.vertex) * 4 + t.corner, product);
      }
    }
  }
};

// channels_last. MapBlocks' x: log2 of the lanes per pixel; y: tiles of pixels.
template <typename S, int Count>
__global__ void __launch_bounds__(block_threads, 4)
    pixel_grads_kernel(const __grid_constant__ SampleBackwardArguments<S> b,
                       const __grid_constant__ MapPlan plan, const __grid_constant__ MapSlabs slabs) {
  using T = Sum<S>;
  PAHM_SHARED(int32_t, ranges, 4 * tile_pixels);
  const SampleArguments<S>& a = b.forward;
  const int index = plan.find(blockIdx.x);
  const SampleMap<S>& map = a.maps[index];
  const int lane_bits = plan.maps[index].x, tiles = plan.maps[index].y, lanes = 1 << lane_bits;
  int block = plan.block_of(index, blockIdx.x);
  const int first_pixel = block % tiles * tile_pixels, pixels = map.height * map.width;
  block /= tiles;
  const int slab = block % slabs.count[index];
  const int64_t item = block / slabs.count[index];
  find_ranges(map, b.work.sorted.cells + (item * a.map_count + index) * a.vertex_count, a.vertex_count,
              first_pixel, ranges);

  const int channel = (slab * lanes + (threadIdx.x & (lanes - 1))) * Count;
  T* const products = b.work.products == nullptr
                          ? nullptr
                          : b.work.products + (slabs.first[index] + slab) * a.batch * a.vertex_count * 4;
  for (int i = threadIdx.x >> lane_bits; i < tile_pixels; i += block_threads >> lane_bits) {
    const int pixel = first_pixel + i;
    if (pixel >= pixels) break;
    const int64_t offset = (item * pixels + pixel) * map.channels + channel;
    PixelSums<S, Count, 1> sums{};
    const bool touched = ranges[4 * i] < ranges[4 * i + 1] || ranges[4 * i + 2] < ranges[4 * i + 3];
    if (touched && products != nullptr && channel < map.channels) {
      const auto pack = load_pack<Count>(map.data + offset);
#pragma unroll
      for (int c = 0; c < Count; ++c) sums.pixel[0][c] = to_float(pack.values[c]);
    }
    sums.gather(b, map, item, index, pixel, i, ranges, channel, 0, lanes, products);
    if (map.grad != nullptr && channel < map.channels) store_sums(map.grad + offset, sums.sum[0]);
  }
}

// Packs of channels that a lane of planes has at a pixel: at most 32 sums.
template <int Count>
inline constexpr int plane_groups = Count == 8 ? 4 : 8;

// planes: two lanes share a pixel, so that they read a whole sector of an output gradient; a warp has 16
// pixels. MapBlocks' x: unused; y: tiles of pixels.
template <typename S, int Count>
__global__ void __launch_bounds__(block_threads, 2)
    plane_grads_kernel(const __grid_constant__ SampleBackwardArguments<S> b,
                       const __grid_constant__ MapPlan plan, const __grid_constant__ MapSlabs slabs) {
  using T = Sum<S>;
  constexpr int groups = plane_groups<Count>, slab_channels = 2 * Count * groups, block_slabs = 4;
  PAHM_SHARED(int32_t, ranges, 4 * tile_pixels);
  const SampleArguments<S>& a = b.forward;
  const int index = plan.find(blockIdx.x);
  const SampleMap<S>& map = a.maps[index];
  const int tiles = plan.maps[index].y, slab_blocks = (slabs.count[index] + block_slabs - 1) / block_slabs;
  int block = plan.block_of(index, blockIdx.x);
  const int first_pixel = block % tiles * tile_pixels, pixels = map.height * map.width;
  block /= tiles;
  const int64_t item = block / slab_blocks;
  find_ranges(map, b.work.sorted.cells + (item * a.map_count + index) * a.vertex_count, a.vertex_count,
              first_pixel, ranges);

  const int warp = threadIdx.x / 32, slab = block % slab_blocks * block_slabs + warp / 2;
  const int i = warp % 2 * 16 + threadIdx.x % 32 / 2, pixel = first_pixel + i;
  if (pixel >= pixels || slab >= slabs.count[index]) return;
  T* const products = b.work.products == nullptr
                          ? nullptr
                          : b.work.products + (slabs.first[index] + slab) * a.batch * a.vertex_count * 4;
  const int channel = slab * slab_channels + static_cast<int>(threadIdx.x % 2) * Count;
  const int64_t plane = static_cast<int64_t>(pixels),
                offset = (item * map.channels + channel) * plane + pixel;
  PixelSums<S, Count, groups> sums{};
  const bool touched = ranges[4 * i] < ranges[4 * i + 1] || ranges[4 * i + 2] < ranges[4 * i + 3];
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int c = 0; c < Count; ++c) {
      const int further = g * 2 * Count + c;
      if (touched && products != nullptr && channel + further < map.channels)
        sums.pixel[g][c] = to_float(load(map.data + offset + further * plane));
    }
  }
  sums.gather(b, map, item, index, pixel, i, ranges, channel, 2 * Count, 2, products);
  if (map.grad == nullptr) return;
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int c = 0; c < Count; ++c) {
      const int further = g * 2 * Count + c;
      if (channel + further < map.channels)
        store(map.grad + offset + further * plane, from_float<S>(sums.sum[g][c]));
    }
  }
}

// ---- gradients of vertices and camera ----

template <typename S>
__global__ void __launch_bounds__(block_threads, 2)
    point_grads_kernel(const __grid_constant__ SampleBackwardArguments<S> b,
                       const __grid_constant__ MapSlabs slabs, int tiles) {
  using T = Sum<S>;
  PAHM_SHARED(T, partial, 9 * (block_threads / 32));
  const SampleArguments<S>& a = b.forward;
  const int64_t item = blockIdx.x / tiles;
  T camera_grad[9] = {};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int base = (blockIdx.x % tiles * block_threads + threadIdx.x) - lane; base < a.vertex_count;
       base += tiles * block_threads) {
    const int n = base + lane;
    T vertex[3];
    load_vertices(a, item, base, vertex);
    if (n >= a.vertex_count) continue;
    const Projected<T> p = project(a, item, vertex);
    T g[2] = {0, 0};
    for (int i = 0; i < a.map_count; ++i) {
      const SampleMap<S>& map = a.maps[i];
      Cell<T> cell;
      if (!locate(a, map, p, cell)) continue;
      T product[4] = {};
      for (int slab = 0; slab < slabs.count[i]; ++slab) {
        const T* const at =
            b.work.products +
            ((slabs.first[i] + slab) * a.batch * a.vertex_count + item * a.vertex_count + n) * 4;
        // No product was stored for a pixel outside the map.
        const auto pack = load_pack<4>(at);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (cell.inside(k, map.height, map.width)) product[k] += pack.values[k];
        }
      }
      g[0] += cell.dx * ((product[1] - product[0]) * (1 - cell.fy) + (product[3] - product[2]) * cell.fy);
      g[1] += cell.dy * ((product[2] - product[0]) * (1 - cell.fx) + (product[3] - product[1]) * cell.fx);
    }
    T vertex_grad[3] = {0, 0, 0};
    if (p.valid && a.camera_kind == Camera::none) {
      vertex_grad[0] = g[0];
      vertex_grad[1] = g[1];
    } else if (p.valid && a.camera_kind == Camera::weak) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        vertex_grad[i] = p.camera[0] * g[i];
        camera_grad[0] += g[i] * (p.vertex[i] + p.camera[1 + i]);
        camera_grad[1 + i] += p.camera[0] * g[i];
      }
    } else if (p.valid) {
      T r[3] = {g[0] * a.scale[0] / p.ray[2], g[1] * a.scale[1] / p.ray[2], 0};
      r[2] = -(r[0] * (p.ray[0] / p.ray[2]) + r[1] * (p.ray[1] / p.ray[2]));
#pragma unroll
      for (int i = 0; i < 3; ++i) {
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          vertex_grad[j] += p.camera[3 * i + j] * r[i];
          camera_grad[3 * i + j] += r[i] * p.vertex[j];
        }
      }
    }
    const int width = a.camera_kind == Camera::none ? 2 : 3;
    if (b.vertex_grad == nullptr) continue;
    for (int i = 0; i < width; ++i)
      store(b.vertex_grad + (item * a.vertex_count + n) * width + i, vertex_grad[i]);
  }
  if (b.camera_grad == nullptr) return;
  // One block per item sums over lanes, then over warps, in a fixed order.
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    for (int distance = 16; distance > 0; distance /= 2)
      camera_grad[i] += shuffle_xor(0xffffffff, camera_grad[i], distance);
    if (lane == 0) partial[warp * 9 + i] = camera_grad[i];
  }
  __syncthreads();
  const int camera_size = a.camera_kind == Camera::perspective ? 9 : 3;
  if (static_cast<int>(threadIdx.x) < camera_size) {
    T sum = 0;
    for (int w = 0; w < block_threads / 32; ++w) sum += partial[w * 9 + threadIdx.x];
    store(b.camera_grad + item * camera_size + threadIdx.x, sum);
  }
}

// ---- plans ----

// How the maps' gradients are computed; both passes over them must agree on this.
template <typename S>
struct SampleBackwardPlan {
  bool wide;  // 16 bytes of channels at a time
  MapSlabs slabs{};
  int slab_count = 0;  // of all maps

  explicit SampleBackwardPlan(const SampleBackwardArguments<S>& b)
      : wide(channels_are_aligned(b.forward, b.output_grad, true)) {
    for (int i = 0; i < b.forward.map_count; ++i) {
      slabs.first[i] = slab_count;
      slabs.count[i] =
          static_cast<int>(ceil_div(b.forward.maps[i].channels, slab_channels(b.forward.maps[i])));
      slab_count += slabs.count[i];
    }
  }

  int count() const { return wide ? 16 / sizeof(S) : 1; }
  int lane_bits(const SampleMap<S>& map) const { return bits_for(map.channels / count(), 5); }
  int slab_channels(const SampleMap<S>& map) const {
    if (map.channels_last) return count() << lane_bits(map);
    return 2 * count() * (count() == 8 ? plane_groups<8> : plane_groups<1>);
  }
};

// Lays out a backward pass's workspace in `memory`, unless that is null, and returns its size in bytes.
template <typename S>
int64_t set_sample_workspace(SampleBackwardArguments<S>& b, void* memory) {
  using T = Sum<S>;
  const int64_t vertices = b.forward.batch * b.forward.vertex_count, entries = vertices * b.forward.map_count;
  char* next = static_cast<char*>(memory);
  int64_t bytes = 0;
  const auto part = [&](int64_t size) {
    char* const begin = next == nullptr ? nullptr : next + bytes;
    bytes += ceil_div(size, 32) * 32;
    return begin;
  };
  const auto sorted = [&](int64_t size) {
    auto* const cells = reinterpret_cast<int32_t*>(part(size * 4));
    return SortedVertices{cells, reinterpret_cast<int32_t*>(part(size * 4))};
  };
  b.work.sorted = sorted(entries);
  b.work.spare = b.forward.vertex_count > sort_chunk ? sorted(entries) : SortedVertices{};
  b.work.positions = reinterpret_cast<Pack<T, 2>*>(part(entries * static_cast<int64_t>(sizeof(Pack<T, 2>))));
  b.work.products = nullptr;
  if (b.vertex_grad == nullptr && b.camera_grad == nullptr) return bytes;
  const int64_t slabs = SampleBackwardPlan<S>(b).slab_count;
  b.work.products = reinterpret_cast<T*>(part(slabs * vertices * 4 * static_cast<int64_t>(sizeof(T))));
  return bytes;
}

template <typename S, int Count>
void map_grads_launch(const SampleBackwardArguments<S>& b, const SampleBackwardPlan<S>& plan,
                      bool channels_last, const Device& device) {
  const SampleArguments<S>& a = b.forward;
  MapPlan blocks{};
  blocks.map_count = a.map_count;
  int64_t count = 0;
  for (int i = 0; i < a.map_count; ++i) {
    const SampleMap<S>& map = a.maps[i];
    const int64_t tiles = ceil_div(static_cast<int64_t>(map.height) * map.width, tile_pixels);
    blocks.maps[i] = {count, plan.lane_bits(map), static_cast<int>(tiles)};
    if (map.channels_last != channels_last || (map.grad == nullptr && b.work.products == nullptr)) continue;
    count += a.batch * tiles * (channels_last ? plan.slabs.count[i] : ceil_div(plan.slabs.count[i], 4));
  }
  if (channels_last) {
    launch(pixel_grads_kernel<S, Count>, count, block_threads, 0, device, b, blocks, plan.slabs);
  } else {
    launch(plane_grads_kernel<S, Count>, count, block_threads, 0, device, b, blocks, plan.slabs);
  }
}

template <typename S>
void vertex_sample_backward_launch(const SampleBackwardArguments<S>& b, const Device& device) {
  const SampleArguments<S>& a = b.forward;
  if (a.batch == 0) return;
  const SampleBackwardPlan<S> plan(b);
  sort_vertices_launch(a, b.work, device);
  for (const bool channels_last : {false, true}) {
    if (plan.wide) {
      map_grads_launch<S, 16 / sizeof(S)>(b, plan, channels_last, device);
    } else {
      map_grads_launch<S, 1>(b, plan, channels_last, device);
    }
  }
  if (b.vertex_grad == nullptr && b.camera_grad == nullptr) return;
  const int tiles = static_cast<int>(ceil_div(a.vertex_count, block_threads));
  const int point_tiles = b.camera_grad != nullptr ? 1 : tiles;
  launch(point_grads_kernel<S>, a.batch * point_tiles, block_threads, 0, device, b, plan.slabs, point_tiles);
}

}  // namespace pahm
