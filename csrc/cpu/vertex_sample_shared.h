// What vertex_sample's kernels are told, for the files that call them.
#pragma once

#include <cstdint>

namespace pahm {

constexpr int plane_block = 16;        // most channels in a unit of sparse planes
constexpr int row_block = 256;         // most channels in any other unit
constexpr int vertex_block = 128;      // vertices in a forward unit if channels are adjacent
constexpr int64_t cached = 64 * 1024;  // approximate pixels x channels in a block of dense planes

// How a map lies in memory and is read. rows: channels are adjacent. dense_planes: channels are a plane apart
// and vertices are many, so a block of planes is first copied to adjacent channels. planes: channels are a
// plane apart and vertices are few, so only the pixels that they touch are read.
enum class Layout { rows, dense_planes, planes };

struct SampleMap {
  const void* data;
  void* grad;  // dense, with adjacent channels or planes like the map; or null
  int64_t channels, height, width;
  int64_t first_channel;                // in the output
  int64_t batch, channel, row, column;  // strides of data, in elements
  Layout layout;
};

struct SampleUnit {
  int64_t map, begin, end;
};

struct SampleJob {
  const SampleMap* maps;
  const SampleUnit* units;
  int64_t unit_count, vertices, channels;  // channels of all maps together
  const void* points;                      // (B, N, 2), normalised, NaN if a vertex is invalid
  const void* zeros;                       // as many zeros as the widest map has channels
  void* output;                            // (B, N, channels)
  const void* output_grad;                 // (B, N, channels)
  void* point_grads;                       // (B, units, N, 2) or null
  bool align_corners, border;
};

}  // namespace pahm
