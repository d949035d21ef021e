// vertex_sample, forward: one launch for all maps of one memory format.
#pragma once

#include "kernels/vertex_sample.cuh"

namespace pahm {

// ---- channels_last: the lanes of a vertex read adjacent channels of its four pixels ----

template <typename S, int Count>
__global__ void __launch_bounds__(block_threads, 4)
    sample_pixels_kernel(const __grid_constant__ SampleArguments<S> a, S* output,
                         const __grid_constant__ MapPlan plan) {
  using T = Sum<S>;
  const int index = plan.find(blockIdx.x);
  const SampleMap<S>& map = a.maps[index];
  const int lane_bits = plan.maps[index].x, tiles = plan.maps[index].y;
  const int block = plan.block_of(index, blockIdx.x);
  const int64_t item = block / tiles;
  const int n = block % tiles * (block_threads >> lane_bits) + (threadIdx.x >> lane_bits);
  if (n >= a.vertex_count) return;
  T vertex[3];
  load_vertex(a, item, n, vertex);
  Cell<T> cell;
  const bool found = locate(a, map, project(a, item, vertex), cell);
  const int64_t pixels = static_cast<int64_t>(map.height) * map.width;
  const S* const source = map.data + item * pixels * map.channels;
  S* const target = output + (item * a.vertex_count + n) * a.channels + map.first_channel;
  const int lanes = 1 << lane_bits;
  for (int channel = (threadIdx.x & (lanes - 1)) * Count; channel < map.channels; channel += lanes * Count) {
    T sum[Count] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!found || !cell.inside(k, map.height, map.width)) continue;
      const int64_t pixel = static_cast<int64_t>(cell.y + (k >> 1)) * map.width + cell.x + (k & 1);
      const auto pack = load_pack<Count>(source + pixel * map.channels + channel);
      const T weight = cell.weight(k);
#pragma unroll
      for (int c = 0; c < Count; ++c) sum[c] += weight * to_float(pack.values[c]);
    }
    store_sums(target + channel, sum);
  }
}

// ---- planes: a block stages a band of rows of a few planes in shared memory ----

// Channels per block: 32 bytes of an output row.
template <typename S>
inline constexpr int plane_channels = 32 / sizeof(S);
inline constexpr int most_band_rows = 64;

// Elements between two staged planes: room for `rows` rows and the rest of a sector at both ends. The lanes
// of a vertex read the same place of each plane, and with this distance they use different banks.
template <typename S>
__host__ __device__ constexpr int64_t plane_pitch(int rows, int width) {
  constexpr int sector = 32 / sizeof(S), wave = 128 / sizeof(S), step = wave / plane_channels<S>;
  return ceil_div(int64_t{1} * rows * width + 2 * sector, wave) * wave + step;
}

// A vertex whose cell begins in the band.
template <typename T>
struct Spot {
  T fx, fy;
  int vertex, x, y;
};

// MapBlocks' x: rows of cells in a band, or 0 if the map is too wide to stage and is read in place. y: bands.
template <typename S>
__global__ void __launch_bounds__(block_threads, 3)
    sample_planes_kernel(const __grid_constant__ SampleArguments<S> a, S* output,
                         const __grid_constant__ MapPlan plan) {
  using T = Sum<S>;
  constexpr int channels = plane_channels<S>, sector = 32 / sizeof(S);
  PAHM_DYNAMIC_SHARED(S, tile);
  PAHM_SHARED(int32_t, low, most_band_rows + 1);
  PAHM_SHARED(int32_t, high, most_band_rows + 1);
  PAHM_SHARED(Spot<T>, spots, block_threads);

  const int index = plan.find(blockIdx.x);
  const SampleMap<S>& map = a.maps[index];
  const bool staged = plan.maps[index].x > 0;
  // The first cell row is -1; only its lower pixels are on the map.
  const int band_rows = staged ? plan.maps[index].x : map.height + 1, bands = plan.maps[index].y;
  int block = plan.block_of(index, blockIdx.x);
  const int first_cell_row = block % bands * band_rows - 1;
  const int last_cell_row = first_cell_row + band_rows - 1;
  const int slabs = static_cast<int>(ceil_div(map.channels, channels));
  block /= bands;
  const int first_channel = block % slabs * channels;
  const int64_t item = block / slabs, pixels = static_cast<int64_t>(map.height) * map.width;
  const int used = first_channel + channels < map.channels ? channels : map.channels - first_channel;
  const S* const planes = map.data + (item * map.channels + first_channel) * pixels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = block_threads / 32;

  // Stage the pixels that the band's vertices need, row by row.
  const int first_row = first_cell_row < 0 ? 0 : first_cell_row;
  const int end_row = last_cell_row + 2 < map.height ? last_cell_row + 2 : map.height;
  const int rows = end_row - first_row, pitch = static_cast<int>(plane_pitch<S>(band_rows + 1, map.width));
  const int tile_begin = first_row * map.width - sector;
  if (staged) {
    for (int r = threadIdx.x; r < rows; r += block_threads) {
      low[r] = map.width;
      high[r] = -1;
    }
    __syncthreads();
    for (int base = warp * 32; base < a.vertex_count; base += block_threads) {
      T vertex[3];
      load_vertices(a, item, base, vertex);
      Cell<T> cell;
      if (base + lane >= a.vertex_count || !locate(a, map, project(a, item, vertex), cell)) continue;
      if (cell.y < first_cell_row || cell.y > last_cell_row) continue;
      for (int y = cell.y < 0 ? 0 : cell.y; y <= cell.y + 1 && y < map.height; ++y) {
        shared_atomic_min(low, y - first_row, cell.x < 0 ? 0 : cell.x);
        shared_atomic_max(high, y - first_row, cell.x + 1 < map.width ? cell.x + 1 : map.width - 1);
      }
    }
    __syncthreads();
    // Whole sectors, each read once: the upper row reads a sector that several rows share.
    for (int run = warp; run < rows * used; run += warps) {
      const int r = run % rows, c = run / rows, row_begin = (first_row + r) * map.width;
      if (high[r] < 0) continue;
      const S* const plane = planes + c * pixels;
      const int misalignment = static_cast<int>(reinterpret_cast<uintptr_t>(plane) / sizeof(S) % sector);
      int begin = (row_begin + low[r] + misalignment) / sector * sector - misalignment;
      int end = (row_begin + high[r] + misalignment) / sector * sector + sector - misalignment;
      for (int q = r - 1; q >= 0 && (r - q - 1) * map.width < sector; --q) {
        if (high[q] < 0) continue;
        const int taken =
            ((first_row + q) * map.width + high[q] + misalignment) / sector * sector + sector - misalignment;
        begin = begin < taken ? taken : begin;
        break;
      }
      begin = begin < 0 ? 0 : begin;
      end = end < pixels ? end : static_cast<int>(pixels);
      for (int e = begin + lane; e < end; e += 32) tile[c * pitch + e - tile_begin] = load(plane + e);
    }
    __syncthreads();
  }

  // A warp finds which of its 32 vertices lie in the band and samples 32 bytes of channels for each.
  for (int base = warp * 32; base < a.vertex_count; base += block_threads) {
    const int n = base + lane;
    T vertex[3];
    load_vertices(a, item, base, vertex);
    Cell<T> cell;
    const bool found = n < a.vertex_count && locate(a, map, project(a, item, vertex), cell);
    const bool mine = n < a.vertex_count &&
                      (found ? cell.y >= first_cell_row && cell.y <= last_cell_row : first_cell_row < 0);
    const uint32_t all = ballot(0xffffffff, mine);
    const int count = __popc(all), rank = __popc(all & ((1u << lane) - 1));
    if (mine)
      spots[warp * 32 + rank] =
          found ? Spot<T>{cell.fx, cell.fy, n, cell.x, cell.y} : Spot<T>{0, 0, n, -2, 0};
    __syncwarp(0xffffffff);
    const int c = lane % channels;
    for (int i = lane / channels; c < used && i < count; i += 32 / channels) {
      const Spot<T> spot = spots[warp * 32 + i];
      cell.x = spot.x;
      cell.y = spot.y;
      cell.fx = spot.fx;
      cell.fy = spot.fy;
      T sum = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!cell.inside(k, map.height, map.width)) continue;
        const int pixel = (cell.y + (k >> 1)) * map.width + cell.x + (k & 1);
        const S value =
            staged ? static_cast<S>(tile[c * pitch + pixel - tile_begin]) : load(planes + c * pixels + pixel);
        sum += cell.weight(k) * to_float(value);
      }
      store(
          output + (item * a.vertex_count + spot.vertex) * a.channels + map.first_channel + first_channel + c,
          from_float<S>(sum));
    }
    __syncwarp(0xffffffff);
  }
}

// ---- plans ----

template <typename S, int Count>
void sample_pixels_launch(const SampleArguments<S>& a, S* output, const Device& device) {
  MapPlan plan{};
  plan.map_count = a.map_count;
  int64_t blocks = 0;
  for (int i = 0; i < a.map_count; ++i) {
    const int lane_bits = bits_for(a.maps[i].channels / Count, 5);
    const int64_t tiles = ceil_div(a.vertex_count, block_threads >> lane_bits);
    plan.maps[i] = {blocks, lane_bits, static_cast<int>(tiles)};
    if (a.maps[i].channels > 0) blocks += a.batch * tiles;
  }
  launch(sample_pixels_kernel<S, Count>, blocks, block_threads, 0, device, a, output, plan);
}

template <typename S>
void sample_planes_launch(const SampleArguments<S>& a, S* output, const Device& device) {
  constexpr int64_t most_bytes = 32 * 1024;
  const int64_t static_bytes =
      block_threads * sizeof(Spot<Sum<S>>) + 2 * (most_band_rows + 1) * sizeof(int32_t);
  MapPlan plan{};
  plan.map_count = a.map_count;
  int64_t blocks = 0, shared_bytes = 0;
  for (int i = 0; i < a.map_count; ++i) {
    const SampleMap<S>& map = a.maps[i];
    const auto bytes = [&](int rows) {
      return plane_pitch<S>(rows + 1, map.width) * plane_channels<S> * static_cast<int64_t>(sizeof(S));
    };
    int rows = 0;
    while (rows < map.height + 1 && rows < most_band_rows && bytes(rows + 1) <= most_bytes) ++rows;
    if (rows == 0 && bytes(1) + static_bytes <= device.shared_limit) rows = 1;
    // Bands of equal height.
    const int64_t bands = rows == 0 ? 1 : ceil_div(map.height + 1, rows);
    if (rows > 0) rows = static_cast<int>(ceil_div(map.height + 1, bands));
    plan.maps[i] = {blocks, rows, static_cast<int>(bands)};
    blocks += a.batch * bands * ceil_div(map.channels, plane_channels<S>);
    if (rows > 0 && bytes(rows) > shared_bytes) shared_bytes = bytes(rows);
  }
  launch(sample_planes_kernel<S>, blocks, block_threads, shared_bytes, device, a, output, plan);
}

// Only the maps of one memory format.
template <typename S>
SampleArguments<S> maps_of_format(const SampleArguments<S>& a, bool channels_last) {
  SampleArguments<S> chosen = a;
  chosen.map_count = 0;
  for (int i = 0; i < a.map_count; ++i) {
    if (a.maps[i].channels_last == channels_last) chosen.maps[chosen.map_count++] = a.maps[i];
  }
  return chosen;
}

// Whether all accesses to the channels of the maps and the output can be 16 bytes wide.
template <typename S>
bool channels_are_aligned(const SampleArguments<S>& a, const void* rows, bool grads) {
  constexpr int wide = 16 / sizeof(S);
  bool all = a.channels % wide == 0 && aligned(rows);
  for (int i = 0; i < a.map_count; ++i) {
    const SampleMap<S>& map = a.maps[i];
    all &= map.channels % wide == 0 && map.first_channel % wide == 0;
    if (map.channels_last) all &= aligned(map.data) && (!grads || aligned(map.grad));
  }
  return all;
}

template <typename S>
void vertex_sample_launch(const SampleArguments<S>& a, S* output, const Device& device) {
  if (a.batch * a.vertex_count * a.channels == 0) return;
  const SampleArguments<S> planes = maps_of_format(a, false), pixels = maps_of_format(a, true);
  if (planes.map_count > 0) sample_planes_launch(planes, output, device);
  if (pixels.map_count == 0) return;
  if (channels_are_aligned(pixels, output, false)) {
    sample_pixels_launch<S, 16 / sizeof(S)>(pixels, output, device);
  } else {
    sample_pixels_launch<S, 1>(pixels, output, device);
  }
}

}  // namespace pahm
