// spiral_conv: x (B, N, C), table (L, M), weight (O, L * C) -> (B, M, O), and its gradients: three matrix
// products. No gathered matrix is ever written to memory.
//
//                rows        columns   summed over      left[row, k]                       right[k, column]
//   forward      (b, m)      o         (l, c)           x[b, table[l, m], c]               weight[o, (l, c)]
//   input grad   (b, n)      c         (l, o)           sum of grad[b, m, o] over          weight[o, (l, c)]
//                                                       the m with table[l, m] == n
//   weight grad  (l, c)      o         (b, m)           x[b, table[l, m], c]               grad[b, m, o]
//
// A block computes a tile of the result from tiles of both sides in shared memory (tile_product.cuh). Sums
// over a long k are split between blocks, and the parts are added in a fixed order: no atomics, the same bits
// in every run.
#pragma once

#include "kernels/tile_product.cuh"

namespace pahm {

// Meshes, input (N) and output (M) vertices, spiral length, input and output channels; L * M fits an int.
struct SpiralSizes {
  int64_t batch;
  int vertices, rows, length, channels, out_channels;
};

template <typename S>
struct SpiralConvArguments : SpiralSizes {
  const S* x;            // (B, N, C)
  const int32_t* table;  // (L, M): the rows of a tile read neighbouring entries
  const S* weight;       // (O, L * C)
  const S* bias;         // (O), or null
  int activation;        // as pahm_ops/spiral_conv.py numbers them: none, ReLU, ELU, GELU
  S* out;                // (B, M, O)
};

template <typename S>
struct SpiralInputGradArguments : SpiralSizes {
  const S* grad;              // (B, M, O)
  const int32_t* t_pointers;  // (L * N + 1): entry l * N + n says where the list of (l, n) begins in t_rows
  const int32_t* t_rows;      // (L * M): each list is the m with table[l, m] == n, ascending
  const S* weight;            // (O, L * C)
  S* out;                     // (B, N, C)
};

template <typename S>
struct SpiralWeightGradArguments : SpiralSizes {
  const S* grad;         // (B, M, O)
  const S* x;            // (B, N, C)
  const int32_t* table;  // (L, M)
  S* out;                // (O, L * C)
};

// ---- what a thread fetches from each side ----

// A position in (l, c) that advances by at most a few rows of c.
struct SpiralPosition {
  int l, c;
  __device__ SpiralPosition(int64_t k, int channels)
      : l(static_cast<int>(k / channels)), c(static_cast<int>(k % channels)) {}
  __device__ void advance(int by, int channels) {
    for (c += by; c >= channels; c -= channels) ++l;
  }
};

// A row (item, m) among the rows of all meshes; it advances by at most a few meshes.
struct MeshRow {
  int64_t item;
  int m;
  __device__ MeshRow(int64_t row, int rows) : item(row / rows), m(static_cast<int>(row % rows)) {}
  __device__ void advance(int by, int rows) {
    for (m += by; m >= rows; m -= rows) ++item;
  }
};

template <typename S, int Count, typename Shape>
struct ForwardLeft : AlongK<Count, Shape::rows, Shape> {
  using Base = AlongK<Count, Shape::rows, Shape>;
  using Arguments = SpiralConvArguments<S>;
  SpiralPosition at;
  MeshRow first;
  // The table's entries at l == known are kept for a few steps of k. (There are too many packs of one number
  // to keep.)
  int known = -1;
  int32_t vertices[Base::packs];

  __device__ ForwardLeft(const Arguments& a, int64_t first_row, int64_t first_k)
      : at(first_k + Base::k(), a.channels), first(first_row + Base::line(0), a.rows) {}
  __device__ void fetch(const Arguments& a, TilePack<S, Count> (&packs)[Base::packs]) {
    const bool look = Count == 1 || at.l != known;
    known = at.l;
    MeshRow row = first;
#pragma unroll
    for (int i = 0; i < Base::packs; ++i) {
      packs[i] = {};
      if (row.item < a.batch && at.l < a.length) {
        if (look) vertices[i] = load(a.table + static_cast<int64_t>(at.l) * a.rows + row.m);
        if (is_index(vertices[i], a.vertices))
          packs[i].set(load_pack<Count>(a.x + (row.item * a.vertices + vertices[i]) * a.channels + at.c));
      }
      row.advance(Base::line_step, a.rows);
    }
    at.advance(Shape::depth, a.channels);
  }
};

template <typename S, int Count, typename Shape>
struct ForwardRight : AlongK<Count, Shape::columns, Shape> {
  using Base = AlongK<Count, Shape::columns, Shape>;
  using Arguments = SpiralConvArguments<S>;
  int64_t next_k, first_column;

  __device__ ForwardRight(const Arguments&, int64_t first_column_, int64_t first_k)
      : next_k(first_k + Base::k()), first_column(first_column_) {}
  __device__ void fetch(const Arguments& a, TilePack<S, Count> (&packs)[Base::packs]) {
    const int64_t width = static_cast<int64_t>(a.length) * a.channels;
#pragma unroll
    for (int i = 0; i < Base::packs; ++i) {
      packs[i] = {};
      const int64_t column = first_column + Base::line(i);
      if (!Base::exists(i) || column >= a.out_channels || next_k >= width) continue;
      packs[i].set(load_pack<Count>(a.weight + column * width + next_k));
    }
    next_k += Shape::depth;
  }
};

template <typename S, int Count, typename Shape>
struct InputGradLeft : AlongK<Count, Shape::rows, Shape> {
  using Base = AlongK<Count, Shape::rows, Shape>;
  using Arguments = SpiralInputGradArguments<S>;
  SpiralPosition at;  // c counts output channels here
  MeshRow first;
  int known = -1;                                                      // as in ForwardLeft
  int32_t begin[Base::packs], end[Base::packs], head[Base::packs][2];  // head: a list's first two

  __device__ InputGradLeft(const Arguments& a, int64_t first_row, int64_t first_k)
      : at(first_k + Base::k(), a.out_channels), first(first_row + Base::line(0), a.vertices) {}
  __device__ void fetch(const Arguments& a, TilePack<S, Count> (&packs)[Base::packs]) {
    const bool look = Count == 1 || at.l != known;
    known = at.l;
    MeshRow row = first;
#pragma unroll
    for (int i = 0; i < Base::packs; ++i) {
      packs[i] = {};
      if (row.item < a.batch && at.l < a.length) {
        if (look) {
          const int32_t* const list = a.t_pointers + static_cast<int64_t>(at.l) * a.vertices + row.m;
          begin[i] = list_bound(load(list), a.length * a.rows);
          end[i] = list_bound(load(list + 1), a.length * a.rows);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (begin[i] + j < end[i]) head[i][j] = load(a.t_rows + begin[i] + j);
          }
        }
        for (int e = begin[i]; e < end[i]; ++e) {
          const int known_head = e == begin[i] ? head[i][0] : head[i][1];
          const int32_t m = e - begin[i] < 2 ? known_head : load(a.t_rows + e);
          if (!is_index(m, a.rows)) continue;
          packs[i].add(load_pack<Count>(a.grad + (row.item * a.rows + m) * a.out_channels + at.c));
        }
      }
      row.advance(Base::line_step, a.vertices);
    }
    at.advance(Shape::depth, a.out_channels);
  }
};

template <typename S, int Count, typename Shape>
struct InputGradRight : AlongLine<Count, Shape::columns, Shape> {
  using Base = AlongLine<Count, Shape::columns, Shape>;
  using Arguments = SpiralInputGradArguments<S>;
  SpiralPosition first;
  int64_t column;

  __device__ InputGradRight(const Arguments& a, int64_t first_column, int64_t first_k)
      : first(first_k, a.out_channels), column(first_column + Base::line()) {}
  __device__ void fetch(const Arguments& a, TilePack<S, Count> (&packs)[Base::packs]) {
    const int64_t width = static_cast<int64_t>(a.length) * a.channels;
#pragma unroll
    for (int i = 0; i < Base::packs; ++i) {
      packs[i] = {};
      SpiralPosition at = first;
      at.advance(Base::k(i), a.out_channels);
      if (Base::exists(i) && column < a.channels && at.l < a.length) {
        packs[i].set(
            load_pack<Count>(a.weight + at.c * width + static_cast<int64_t>(at.l) * a.channels + column));
      }
    }
    first.advance(Shape::depth, a.out_channels);
  }
};

template <typename S, int Count, typename Shape>
struct WeightGradLeft : AlongLine<Count, Shape::rows, Shape> {
  using Base = AlongLine<Count, Shape::rows, Shape>;
  using Arguments = SpiralWeightGradArguments<S>;
  MeshRow first;
  SpiralPosition at;

  __device__ WeightGradLeft(const Arguments& a, int64_t first_row, int64_t first_k)
      : first(first_k, a.rows), at(first_row + Base::line(), a.channels) {}
  __device__ void fetch(const Arguments& a, TilePack<S, Count> (&packs)[Base::packs]) {
#pragma unroll
    for (int i = 0; i < Base::packs; ++i) {
      packs[i] = {};
      MeshRow row = first;
      row.advance(Base::k(i), a.rows);
      if (at.l >= a.length || row.item >= a.batch) continue;
      const int32_t vertex = load(a.table + static_cast<int64_t>(at.l) * a.rows + row.m);
      if (!is_index(vertex, a.vertices)) continue;
      packs[i].set(load_pack<Count>(a.x + (row.item * a.vertices + vertex) * a.channels + at.c));
    }
    first.advance(Shape::depth, a.rows);
  }
};

template <typename S, int Count, typename Shape>
struct WeightGradRight : AlongLine<Count, Shape::columns, Shape> {
  using Base = AlongLine<Count, Shape::columns, Shape>;
  using Arguments = SpiralWeightGradArguments<S>;
  int64_t row, column;

  __device__ WeightGradRight(const Arguments&, int64_t first_column, int64_t first_k)
      : row(first_k), column(first_column + Base::line()) {}
  __device__ void fetch(const Arguments& a, TilePack<S, Count> (&packs)[Base::packs]) {
#pragma unroll
    for (int i = 0; i < Base::packs; ++i) {
      packs[i] = {};
      const int64_t k = row + Base::k(i);
      if (Base::exists(i) && column < a.out_channels && k < a.batch * a.rows)
        packs[i].set(load_pack<Count>(a.grad + k * a.out_channels + column));
    }
    row += Shape::depth;
  }
};

// ---- the three products ----

template <typename S>
struct SpiralForward {
  using Scalar = S;
  using Arguments = SpiralConvArguments<S>;
  template <int Count, typename Shape>
  using Left = ForwardLeft<S, Count, Shape>;
  template <int Count, typename Shape>
  using Right = ForwardRight<S, Count, Shape>;
  static constexpr bool columns_adjacent = true;  // in the result's memory
  static ProductSize size(const Arguments& a) {
    return {a.batch * a.rows, a.out_channels, static_cast<int64_t>(a.length) * a.channels};
  }
  static bool wide(const Arguments& a, int count) {
    return a.channels % count == 0 && aligned(a.x) && aligned(a.weight) && aligned(a.out);
  }
  static int64_t input_bytes(const Arguments& a) {
    return static_cast<int64_t>(sizeof(S)) *
           (a.batch * a.vertices * a.channels + static_cast<int64_t>(a.out_channels) * a.length * a.channels);
  }
  __device__ static Sum<S> finish(const Arguments& a, Sum<S> sum, int64_t column) {
    return activate(a.bias == nullptr ? sum : sum + to_float(load(a.bias + column)), a.activation);
  }
};

template <typename S>
struct SpiralInputGrad {
  using Scalar = S;
  using Arguments = SpiralInputGradArguments<S>;
  template <int Count, typename Shape>
  using Left = InputGradLeft<S, Count, Shape>;
  template <int Count, typename Shape>
  using Right = InputGradRight<S, Count, Shape>;
  static constexpr bool columns_adjacent = true;
  static ProductSize size(const Arguments& a) {
    return {a.batch * a.vertices, a.channels, static_cast<int64_t>(a.length) * a.out_channels};
  }
  static bool wide(const Arguments& a, int count) {
    return a.channels % count == 0 && a.out_channels % count == 0 && aligned(a.grad) && aligned(a.weight) &&
           aligned(a.out);
  }
  static int64_t input_bytes(const Arguments& a) {
    return static_cast<int64_t>(sizeof(S)) *
           (a.batch * a.rows * a.out_channels + static_cast<int64_t>(a.out_channels) * a.length * a.channels);
  }
  __device__ static Sum<S> finish(const Arguments&, Sum<S> sum, int64_t) { return sum; }
};

template <typename S>
struct SpiralWeightGrad {
  using Scalar = S;
  using Arguments = SpiralWeightGradArguments<S>;
  template <int Count, typename Shape>
  using Left = WeightGradLeft<S, Count, Shape>;
  template <int Count, typename Shape>
  using Right = WeightGradRight<S, Count, Shape>;
  static constexpr bool columns_adjacent = false;
  static ProductSize size(const Arguments& a) {
    return {static_cast<int64_t>(a.length) * a.channels, a.out_channels, a.batch * a.rows};
  }
  static bool wide(const Arguments& a, int count) {
    return a.channels % count == 0 && a.out_channels % count == 0 && aligned(a.grad) && aligned(a.x) &&
           aligned(a.out);
  }
  static int64_t input_bytes(const Arguments& a) {
    return static_cast<int64_t>(sizeof(S)) * a.batch *
           (static_cast<int64_t>(a.rows) * a.out_channels + static_cast<int64_t>(a.vertices) * a.channels);
  }
  __device__ static Sum<S> finish(const Arguments&, Sum<S> sum, int64_t) { return sum; }
};

}  // namespace pahm
