// 3 x 3 convolutions in the frequency domain of Winograd's F(2 x 2, 3 x 3) (Lavin and Gray,
// arXiv:1509.09308): 16 products for 4 pixels where the definition has 36. Compiled once per instruction set
// (cpu/foreach_isa.h): no guard.
namespace pahm::PAHM_ISA {

inline void cut(Winograd& a) {
  a.tiles_y = (a.height + 1) / 2;
  a.tiles_x = (a.width + 1) / 2;
  a.block = winograd_block(a.channels);
  a.panels = (a.columns + panel_width<float> - 1) / panel_width<float>;
  // Where blocks are few, several items share one; each transforms its inputs again, which costs little.
  constexpr int64_t enough = 8;
  const int64_t blocks = (a.batch * a.tiles_y * a.tiles_x + a.block - 1) / a.block;
  a.groups = std::min(a.panels, (enough + blocks - 1) / blocks);
}

inline int64_t item_count(const Winograd& a) {
  return (a.batch * a.tiles_y * a.tiles_x + a.block - 1) / a.block * a.groups;
}

// The pixels of a tile; those beyond the map are zeros.
struct TilePlace {
  int64_t item, y, x;  // of the first output pixel
};
inline TilePlace place_of(const Winograd& a, int64_t tile) {
  const int64_t each = a.tiles_y * a.tiles_x;
  return {tile / each, tile % each / a.tiles_x * 2, tile % each % a.tiles_x * 2};
}

// V[k] (block, channels) = B^T d B for `count` tiles from `first`.
inline void transform_inputs(const Winograd& a, int64_t first, int64_t count, float* V) {
  constexpr int64_t n = lanes<float>;
  const int64_t plane = a.block * a.channels;
  for (int64_t t = 0; t < count; ++t) {
    const TilePlace at = place_of(a, first + t);
    const float* pixel[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t y = at.y - 1 + i / 4, x = at.x - 1 + i % 4;
      const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
      pixel[i] = inside ? a.in.row((at.item * a.height + y) * a.width + x) : a.zeros;
    }
    float* out = V + t * a.channels;
    for (int64_t c = 0; c < a.channels; c += n) {
      Vec<float> rows[16];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<float> d0 = load(pixel[j] + c), d1 = load(pixel[4 + j] + c);
        const Vec<float> d2 = load(pixel[8 + j] + c), d3 = load(pixel[12 + j] + c);
        rows[j] = d0 - d2;
        rows[4 + j] = d1 + d2;
        rows[8 + j] = d2 - d1;
        rows[12 + j] = d1 - d3;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec<float>* r = rows + 4 * i;
        float* o = out + 4 * i * plane + c;
        store(o, r[0] - r[2]);
        store(o + plane, r[1] + r[2]);
        store(o + 2 * plane, r[2] - r[1]);
        store(o + 3 * plane, r[1] - r[3]);
      }
    }
  }
}

// out (count, NV vectors) = V (count, channels) times a panel.
template <int MR, int NV>
void winograd_tile(const float* V, int64_t channels, const float* panel, float* out) {
  constexpr int64_t n = lanes<float>;
  const float* rows[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) rows[i] = V + i * channels;
  Vec<float> acc[MR][NV] = {};
  multiply<float, MR, NV>(acc, rows, panel, channels);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(out + (i * NV + v) * n, acc[i][v]);
  }
}

template <int MR, int NV>
void winograd_rows(const float* V, int64_t count, int64_t channels, const float* panel, float* out) {
  if constexpr (MR > 1) {
    if (count < MR) return winograd_rows<MR - 1, NV>(V, count, channels, panel, out);
  }
  winograd_tile<MR, NV>(V, channels, panel, out);
}

// One panel of output channels for a block of tiles: 16 products, then A^T m A and what follows it.
template <int NV>
void winograd_panel(const Winograd& a, int64_t first, int64_t count, int64_t column, const float* V,
                    float* M) {
  constexpr int64_t n = lanes<float>, width = NV * n;
  const float* panel = a.weight + column * 16 * a.channels;
  const int64_t pieces = (count + tile_rows - 1) / tile_rows;
  for (int64_t k = 0; k < 16; ++k, panel += a.channels * width) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t row = piece * count / pieces, next = (piece + 1) * count / pieces;
      winograd_rows<tile_rows, NV>(V + (k * a.block + row) * a.channels, next - row, a.channels, panel,
                                   M + (k * a.block + row) * width);
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const TilePlace at = place_of(a, first + t);
    for (int v = 0; v < NV; ++v) {
      const int64_t left = a.columns - column - v * n;
      const Vec<float> bias = load(a.bias + column + v * n);
      Vec<float> rows[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const float* m = M + (j * a.block + t) * width + v * n;
        const int64_t down = 4 * a.block * width;
        const Vec<float> m1 = load(m + down), m2 = load(m + 2 * down);
        rows[0][j] = load(m) + m1 + m2;
        rows[1][j] = m1 - m2 - load(m + 3 * down);
      }
      for (int dy = 0; dy < 2 && at.y + dy < a.height; ++dy) {
        const Vec<float>* r = rows[dy];
        const int64_t row = (at.item * a.height + at.y + dy) * a.width + at.x;
        finish(a, row, column + v * n, left, bias + r[0] + r[1] + r[2]);
        if (at.x + 1 < a.width) finish(a, row + 1, column + v * n, left, bias + r[1] - r[2] - r[3]);
      }
    }
  }
}

inline void run_items(const Winograd& a, int64_t begin, int64_t end, int slot) {
  float* V = a.scratch + slot * winograd_scratch(a.channels);
  float* M = V + 16 * a.block * a.channels;
  const int64_t tiles = a.batch * a.tiles_y * a.tiles_x;
  int64_t transformed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / a.groups, group = item % a.groups;
    const int64_t first = block * a.block, count = std::min(a.block, tiles - first);
    if (block != transformed) transform_inputs(a, first, count, V);
    transformed = block;
    for (int64_t p = group * a.panels / a.groups; p < (group + 1) * a.panels / a.groups; ++p) {
      const int64_t column = p * panel_width<float>;
      if (a.columns - column > lanes<float>) {
        winograd_panel<2>(a, first, count, column, V, M);
      } else {
        winograd_panel<1>(a, first, count, column, V, M);
      }
    }
  }
}

}  // namespace pahm::PAHM_ISA
