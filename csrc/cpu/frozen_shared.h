// The steps of a frozen network, as its kernels read them.
//
// A value is a matrix of float32 rows: a pixel or a vertex of a batch item a row, one item after another, its
// channels adjacent. `stride` is the distance of rows in floats, so that a value can be some of the channels
// of a wider one. A step is cut into items that can be computed in any order.
#pragma once

#include <cstdint>

#include "cpu/activation_kind.h"

namespace pahm {

struct RowsIn {
  const float* data;
  int64_t stride;
  const float* row(int64_t r) const { return data + r * stride; }
};
struct RowsOut {
  float* data;
  int64_t stride;
  float* row(int64_t r) const { return data + r * stride; }
};

enum class Residual : int64_t { none = 0, before_activation = 1, after_activation = 2 };

// Some of the inputs of a product: for output row r of an item, `channels` numbers from row table[r] of the
// same item, or from row r without a table. An entry of -1 stands for zeros.
struct ProductSource {
  RowsIn in;
  int64_t rows, channels;  // rows of an item
  const int32_t* table;
};

// out = activation(bias + sum over sources of weight * row (+ residual)) (+ residual): a convolution on
// pixels or vertices, or a linear layer. Items are tiles: blocks of rows times panels of output channels.
struct Product {
  const ProductSource* sources;
  int64_t source_count, inputs;  // inputs: channels of all sources together
  int64_t batch, rows, columns;
  const float *weight, *bias;  // weight: panels of (inputs, width), see product.h
  const float* zeros;          // as many as the widest source has channels
  RowsIn added;
  Residual residual;
  Activation activation;
  RowsOut out;
  int64_t row_tiles, panels;
  bool panels_outside;  // whether the items of a panel are neighbours, else those of a block of rows
};

// The same for a 3 x 3 convolution of a map with a border of one pixel of zeros. Items are blocks of tiles of
// 2 x 2 output pixels times groups of panels.
struct Winograd {
  int64_t batch, height, width, channels, columns;
  RowsIn in;
  const float *weight, *bias;  // weight: panels of (16, channels, width), see product.h
  const float* zeros;          // as many as there are channels
  RowsIn added;
  Residual residual;
  Activation activation;
  float* scratch;  // winograd_scratch floats for each of `slots` threads
  int64_t slots;
  RowsOut out;
  int64_t tiles_y, tiles_x, block, panels, groups;
};
// Tiles in a block: what they become fits in an L2 cache.
constexpr int64_t winograd_block(int64_t channels) {
  const int64_t fits = (1 << 13) / channels;
  return fits < 6 ? 6 : fits > 24 ? 24 : fits;
}
// Transformed inputs, and sums of one panel of any instruction set.
constexpr int64_t winograd_scratch(int64_t channels) {
  return 16 * winograd_block(channels) * (channels + 32);
}

// A convolution of each channel by itself. Items are output rows times blocks of channels.
struct Depthwise {
  int64_t batch, height, width, channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_y, stride_x, top, left;  // top, left: padding
  RowsIn in;
  const float *weight, *bias;  // (kernel_height * kernel_width, channels), (channels)
  Activation activation;
  RowsOut out;
};

// The largest of each window. Items are output rows of pixels.
struct MaxPool {
  int64_t batch, height, width, channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_y, stride_x, top, left;
  RowsIn in;
  RowsOut out;
};

// A map with a border of zeros. Items are output rows of pixels.
struct Pad {
  int64_t batch, height, width, channels, out_height, out_width, top, left;
  RowsIn in;
  RowsOut out;
};

// Bilinear, without aligned corners. Items are output rows of pixels.
struct Upsample {
  int64_t batch, height, width, channels, out_height, out_width;
  RowsIn in;
  RowsOut out;
};

// Layer normalisation of each row. Items are rows.
struct Norm {
  int64_t rows, channels;
  double epsilon;
  RowsIn in;
  const float *gamma, *beta;  // (channels)
  RowsOut out;
};

// out = activation(scale * in + added), without `added` if its data is null. Items are rows.
struct Elementwise {
  int64_t rows, channels;
  double scale;
  RowsIn in, added;
  Activation activation;
  RowsOut out;
};

// A product with a sparse matrix (rows, vertices). Items are output rows.
struct SparseProduct {
  int64_t batch, vertices, rows, channels;
  const int32_t *pointers, *columns;
  const float* values;
  RowsIn in;
  RowsOut out;
};

// For each channel of a map the mean of two numbers a pixel, weighted by the softmax of its pixels. Items are
// batch items times vectors of channels.
struct SoftArgmax {
  int64_t batch, pixels, channels;
  RowsIn in;
  const float* places;  // (2, pixels)
  RowsOut out;          // a row a channel: (batch * channels, 2)
};

// softmax(scale * q k^T) v of each head. Items are batch items times heads.
struct Attention {
  int64_t batch, vertices, heads, channels;  // channels of a head
  double scale;
  RowsIn q, k, v;
  float* scratch;  // attention_scratch floats an item
  RowsOut out;
};
// Room for k transposed, v in panels and a tile of scores, for any instruction set.
constexpr int64_t attention_scratch(int64_t vertices, int64_t channels) {
  return (vertices + 32) * (channels + 32) * 2 + 16 * (vertices + 32);
}

// vertex_sample of maps with adjacent channels, with a weak-perspective camera (batch, 3) or none. Items are
// batch items times maps times blocks of vertices.
struct SampledMap {
  RowsIn in;
  int64_t height, width, channels;
};
struct Sample {
  const SampledMap* maps;
  int64_t map_count, batch, vertices;
  RowsIn points, camera;
  bool align_corners, border;
  const float* zeros;  // as many as the widest map has channels
  RowsOut out;
};

}  // namespace pahm
