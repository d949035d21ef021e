// Kernels of spiral_conv. Compiled once per instruction set (cpu/foreach_isa.h): no guard.
//
// All three products keep a tile of MR rows by NV vectors of their result in registers. The vectors come from
// consecutive memory; the rows are broadcast one number at a time. One of the two is always read directly
// from where the spiral table points, so nothing is gathered (Dukhan, arXiv:1907.02129).
#include "cpu/activation.h"
#include "cpu/product.h"
#include "cpu/transpose.h"

namespace pahm::PAHM_ISA {

// ---- forward ----

// Lays out a panel of weight (Cout, K), with the output channels from `column`: (K, width), zero beyond Cout.
template <typename T>
void spiral_pack_forward(const SpiralShape& s, const T* weight, int64_t column, T* panel) {
  const int64_t K = s.length * s.channels, width = stored_width<T>(s.out_channels - column);
  const int64_t real = s.out_channels - column < width ? s.out_channels - column : width;
  if (real < width) std::memset(panel, 0, static_cast<size_t>(K * width) * sizeof(T));
  transpose(weight + column * K, K, real, K, panel, width);
}

// For Rows rows from `first_row` of the flattened (B, M): where each row's mesh begins, and the row's place
// in the first row of the table. Rows past `count` repeat the last.
template <int Rows, typename S>
inline __attribute__((always_inline)) void locate_rows(const SpiralForward<S>& a, int64_t first_row,
                                                       int64_t count, const Compute<S>* (&base)[Rows],
                                                       const int32_t* (&place)[Rows]) {
  const SpiralShape& s = a.shape;
  for (int i = 0; i < Rows; ++i) {
    const int64_t r = first_row + (i < count ? i : count - 1);
    base[i] = a.x + r / s.rows * s.vertices * s.channels;
    place[i] = a.table + r % s.rows;
  }
}

template <typename S, int MR, int NV>
void spiral_forward_tile(const SpiralForward<S>& a, const Compute<S>* panel, int64_t first_row, int64_t count,
                         int64_t column) {
  using T = Compute<S>;
  const SpiralShape& s = a.shape;
  const T* base[MR];
  const int32_t* place[MR];
  locate_rows(a, first_row, count, base, place);
  const int64_t columns = s.out_channels - column < NV * lanes<T> ? s.out_channels - column : NV * lanes<T>;
  Vec<T> acc[MR][NV] = {};
  if (a.bias != nullptr) {
    for (int v = 0; v < NV; ++v) {
      const int64_t left = columns - v * lanes<T>;
      const Vec<T> bias = left >= lanes<T> ? load(a.bias + column + v * lanes<T>)
                                           : load_first(a.bias + column + v * lanes<T>, left);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) acc[i][v] = bias;
    }
  }
  for (int64_t l = 0; l < s.length; ++l) {
    const T* rows[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) rows[i] = base[i] + place[i][l * s.rows] * s.channels;
    multiply<T, MR, NV>(acc, rows, panel + l * s.channels * NV * lanes<T>, s.channels);
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    if (i >= count) break;
    S* out = a.out + (first_row + i) * s.out_channels + column;
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const int64_t left = columns - v * lanes<T>;
      const Vec<T> value = activate<T>(acc[i][v], a.activation);
      if (left >= lanes<T>) {
        store(out + v * lanes<T>, value);
      } else {
        store_first(out + v * lanes<T>, value, left);
      }
    }
  }
}

// Tiles begin to end, numbered down the rows of the flattened (B, M) within a panel, then panel by panel.
// `panel` holds one panel and is laid out again for the next.
template <typename S>
void spiral_forward(const SpiralForward<S>& a, Compute<S>* panel, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const int64_t rows = a.shape.batch * a.shape.rows, tiles = (rows + tile_rows - 1) / tile_rows;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t % tiles * tile_rows, column = t / tiles * panel_width<T>;
    const int64_t count = rows - row < tile_rows ? rows - row : tile_rows;
    if (t == begin || row == 0) spiral_pack_forward(a.shape, a.weight, column, panel);
    if (a.shape.out_channels - column > lanes<T>) {
      spiral_forward_tile<S, tile_rows, 2>(a, panel, row, count, column);
    } else {
      spiral_forward_tile<S, tile_rows, 1>(a, panel, row, count, column);
    }
  }
}

// Few output channels would waste a wide tile. Here the vectors run along the input channels, `narrow_rows`
// rows by `Outputs` channels at a time, and are summed at the end. The weight is not packed.
inline constexpr int narrow_rows = PAHM_VECTOR_REGISTERS == 32 ? 4 : 2;

template <typename S, int Outputs>
void spiral_forward_narrow_tile(const SpiralForward<S>& a, int64_t first_row, int64_t count) {
  using T = Compute<S>;
  const SpiralShape& s = a.shape;
  const int64_t K = s.length * s.channels, whole = s.channels / lanes<T> * lanes<T>;
  Vec<T> acc[narrow_rows][Outputs] = {};
  T rest[narrow_rows][Outputs] = {};
  const T* base[narrow_rows];
  const int32_t* place[narrow_rows];
  locate_rows(a, first_row, count, base, place);
  for (int64_t l = 0; l < s.length; ++l) {
    const T* rows[narrow_rows];
    for (int i = 0; i < narrow_rows; ++i) rows[i] = base[i] + place[i][l * s.rows] * s.channels;
    const T* weight = a.weight + l * s.channels;
    for (int64_t c = 0; c < whole; c += lanes<T>) {
      Vec<T> x[narrow_rows];
#pragma GCC unroll 4
      for (int i = 0; i < narrow_rows; ++i) x[i] = load(rows[i] + c);
#pragma GCC unroll 4
      for (int o = 0; o < Outputs; ++o) {
        const Vec<T> w = load(weight + o * K + c);
#pragma GCC unroll 4
        for (int i = 0; i < narrow_rows; ++i) acc[i][o] += x[i] * w;
      }
    }
    for (int64_t c = whole; c < s.channels; ++c) {
      for (int i = 0; i < narrow_rows; ++i) {
        for (int o = 0; o < Outputs; ++o) rest[i][o] += rows[i][c] * weight[o * K + c];
      }
    }
  }
  // The results of the rows are contiguous in memory.
  constexpr int results = narrow_rows * Outputs, width = lanes<T>;
  alignas(PAHM_VECTOR_BYTES) T sums[(results + width - 1) / width * width] = {};
#pragma GCC unroll 4
  for (int i = 0; i < narrow_rows; ++i) {
#pragma GCC unroll 4
    for (int o = 0; o < Outputs; ++o) {
      sums[i * Outputs + o] = sum_lanes<T>(acc[i][o]) + rest[i][o] + (a.bias == nullptr ? T(0) : a.bias[o]);
    }
  }
  S* out = a.out + first_row * Outputs;
  for (int64_t first = 0, left = count * Outputs; left > 0; first += width, left -= width) {
    store_first(out + first, activate<T>(load(sums + first), a.activation), left < width ? left : width);
  }
}

template <typename S>
void spiral_forward_narrow(const SpiralForward<S>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += narrow_rows) {
    const int64_t count = end - row < narrow_rows ? end - row : narrow_rows;
    switch (a.shape.out_channels) {
      case 1:
        spiral_forward_narrow_tile<S, 1>(a, row, count);
        break;
      case 2:
        spiral_forward_narrow_tile<S, 2>(a, row, count);
        break;
      case 3:
        spiral_forward_narrow_tile<S, 3>(a, row, count);
        break;
      case 4:
        spiral_forward_narrow_tile<S, 4>(a, row, count);
        break;
    }
  }
}

// ---- gradient to the input ----

// Lays out a panel of weight (Cout, L, C) with input channels from `column`: (L, Cout, width), zero beyond C.
template <typename T>
void spiral_pack_input_grad(const SpiralShape& s, const T* weight, int64_t column, T* panel) {
  const int64_t width = stored_width<T>(s.channels - column);
  const int64_t real = s.channels - column < width ? s.channels - column : width;
  if (real < width) {
    std::memset(panel, 0, static_cast<size_t>(s.length * s.out_channels * width) * sizeof(T));
  }
  for (int64_t l = 0; l < s.length; ++l) {
    for (int64_t o = 0; o < s.out_channels; ++o, panel += width) {
      const T* source = weight + (o * s.length + l) * s.channels + column;
      std::memcpy(panel, source, static_cast<size_t>(real) * sizeof(T));
    }
  }
}

// One mesh and one panel of input channels: each row's product is added to the vertices of its spiral, always
// in the same order. `sums` is (N, NV vectors).
template <typename S, int NV>
void spiral_input_grad_panel(const SpiralInputGrad<S>& a, const Compute<S>* panel, int64_t b, int64_t column,
                             Compute<S>* sums) {
  using T = Compute<S>;
  const SpiralShape& s = a.shape;
  const int64_t width = NV * lanes<T>;
  std::memset(sums, 0, static_cast<size_t>(s.vertices * width) * sizeof(T));
  const T* grad = a.grad + b * s.rows * s.out_channels;
  for (int64_t l = 0; l < s.length; ++l, panel += s.out_channels * width) {
    for (int64_t m = 0; m < s.rows; m += tile_rows) {
      const int64_t count = s.rows - m < tile_rows ? s.rows - m : tile_rows;
      const T* rows[tile_rows];
      for (int i = 0; i < tile_rows; ++i) rows[i] = grad + (m + (i < count ? i : count - 1)) * s.out_channels;
      Vec<T> acc[tile_rows][NV] = {};
      multiply<T, tile_rows, NV>(acc, rows, panel, s.out_channels);
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i) {
        if (i >= count) break;
        T* target = sums + a.table[l * s.rows + m + i] * width;
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) store(target + v * lanes<T>, load(target + v * lanes<T>) + acc[i][v]);
      }
    }
  }
  const int64_t columns = s.channels - column < width ? s.channels - column : width;
  for (int64_t n = 0; n < s.vertices; ++n) {
    S* out = a.out + (b * s.vertices + n) * s.channels + column;
    for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<S>(sums[n * width + j]);
  }
}

// Items begin to end, in this order: a few meshes at a time, within these each panel, within a panel each of
// these meshes. `panel` is laid out again for each panel; so many rows share one that this costs little.
template <typename S>
void spiral_input_grad(const SpiralInputGrad<S>& a, Compute<S>* panel, Compute<S>* sums, int64_t begin,
                       int64_t end) {
  using T = Compute<S>;
  const int64_t panels = (a.shape.channels + panel_width<T> - 1) / panel_width<T>;
  const int64_t meshes_at_once = a.shape.rows < 512 ? 512 / (a.shape.rows + 1) + 1 : 1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / (meshes_at_once * panels) * meshes_at_once, i = item - first * panels;
    const int64_t meshes = std::min(a.shape.batch - first, meshes_at_once);
    const int64_t b = first + i % meshes, column = i / meshes * panel_width<T>;
    if (item == begin || b == first) spiral_pack_input_grad(a.shape, a.weight, column, panel);
    if (a.shape.channels - column > lanes<T>) {
      spiral_input_grad_panel<S, 2>(a, panel, b, column, sums);
    } else {
      spiral_input_grad_panel<S, 1>(a, panel, b, column, sums);
    }
  }
}

// How the products are cut, for the caller that divides the work.
template <typename T>
void spiral_tiling(SpiralTiling& tiling) {
  tiling = {tile_rows, panel_width<T>, lanes<T>};
}

}  // namespace pahm::PAHM_ISA

#include "cpu/spiral_conv_weight_grad.h"
