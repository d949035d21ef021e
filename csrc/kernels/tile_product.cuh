// A product of two matrices. Each is defined by how a thread fetches its share of a tile.
#pragma once

#include <utility>

#include "kernels/common.cuh"

namespace pahm {

// Some numbers of one side of a product, in the type that is summed.
template <typename S, int Count>
struct TilePack {
  Sum<S> values[Count];

  __device__ void set(const Pack<S, Count>& pack) {
#pragma unroll
    for (int c = 0; c < Count; ++c) values[c] = to_float(pack.values[c]);
  }
  __device__ void add(const Pack<S, Count>& pack) {
#pragma unroll
    for (int c = 0; c < Count; ++c) values[c] += to_float(pack.values[c]);
  }
};

// A block's tile: `rows` by `columns` of the result, `depth` of k at a time. A thread computes thread_rows by
// thread_columns of it in groups of 16 bytes, spread so that a warp reads neighbouring banks.
template <typename T, int Columns, int ThreadRows, int ThreadColumns, int Depth>
struct TileShape {
  static constexpr int rows = 128, columns = Columns, depth = Depth;
  static constexpr int thread_rows = ThreadRows, thread_columns = ThreadColumns;
  static constexpr int threads = rows / thread_rows * (columns / thread_columns);
  static constexpr int row_group = 16 / sizeof(T),
                       column_group = thread_columns < row_group ? thread_columns : row_group;
  // Padding between a side's rows of k, so that lanes that store along k use different banks.
  static constexpr int pad = 16 / sizeof(T);
};

// A side whose packs lie along k: pack i of a thread is k() .. k() + Count - 1 of line `line(i)`.
template <int Count, int Lines, typename Shape>
struct AlongK {
  static constexpr bool along_k = true;
  static constexpr int lines = Lines;
  static constexpr int line_packs = Shape::depth / Count;
  static constexpr int packs = static_cast<int>(ceil_div(Lines * line_packs, Shape::threads));
  static constexpr int line_step = Shape::threads / line_packs;  // from one line of a thread to its next
  static_assert(Shape::depth % Count == 0 && Shape::threads % line_packs == 0);
  __device__ static int k() { return static_cast<int>(threadIdx.x) % line_packs * Count; }
  __device__ static int line(int i) { return static_cast<int>(threadIdx.x) / line_packs + i * line_step; }
  __device__ static bool exists(int i) { return line(i) < Lines; }
};

// A side whose packs lie along its lines: pack i of a thread is line() .. line() + Count - 1 at k `k(i)`.
template <int Count, int Lines, typename Shape>
struct AlongLine {
  static constexpr bool along_k = false;
  static constexpr int lines = Lines;
  static constexpr int row_packs = static_cast<int>(ceil_div(Lines, Count));
  static constexpr int packs = static_cast<int>(ceil_div(Shape::depth * row_packs, Shape::threads));
  static_assert(Shape::threads % row_packs == 0);
  __device__ static int line() { return static_cast<int>(threadIdx.x) % row_packs * Count; }
  __device__ static int k(int i) { return (static_cast<int>(threadIdx.x) + i * Shape::threads) / row_packs; }
  __device__ static bool exists(int i) { return k(i) < Shape::depth; }
};

// The position of a line in row k of a tile. Unchanged, a line's two packs of 8 would share a bank.
template <typename Side, int Count>
__device__ __forceinline__ int line_position(int k, int line) {
  return Side::along_k && Count == 8 && Side::lines >= 32 ? line ^ (k / 8 % 2 * 16) : line;
}

// Stores what a thread fetched into the tile: rows of k, `Pitch` apart.
template <typename Side, int Count, int Pitch, typename Shared, typename S>
__device__ __forceinline__ void put(Shared& tile, int buffer,
                                    const TilePack<S, Count> (&packs)[Side::packs]) {
  using T = Sum<S>;
#pragma unroll
  for (int i = 0; i < Side::packs; ++i) {
    if (!Side::exists(i)) continue;
    if constexpr (Side::along_k) {
#pragma unroll
      for (int c = 0; c < Count; ++c)
        tile[buffer + (Side::k() + c) * Pitch + line_position<Side, Count>(Side::k() + c, Side::line(i))] =
            packs[i].values[c];
    } else {
      constexpr int vector =
          Count < 16 / static_cast<int>(sizeof(T)) ? Count : 16 / static_cast<int>(sizeof(T));
      constexpr int parts = Count / vector;
      static_assert(parts <= 2);
      // Lanes whose first parts share a bank start with different parts.
      const int turn = static_cast<int>(threadIdx.x) / 4 % parts;
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        const int begin = (part + turn) % parts * vector;
        Pack<T, vector> values;
#pragma unroll
        for (int j = 0; j < vector; ++j) {
          values.values[j] = packs[i].values[j];
          if (begin > 0) values.values[j] = packs[i].values[Count - vector + j];
        }
        store_shared(tile, buffer + Side::k(i) * Pitch + Side::line() + begin, values);
      }
    }
  }
}

// Sizes of the result and of the sum over k.
struct ProductSize {
  int64_t rows, columns, depth;
};

struct ProductPlan {
  int64_t column_tiles;  // tiles side by side in a row of the result
  int64_t splits;        // of the sum over k; each has its own blocks
  int64_t split_depth;   // values of k in a split
  void* partial;         // Sum<S> (splits, rows, columns), or null with one split
};

enum { no_activation, relu, elu, gelu };

template <typename T>
__device__ __forceinline__ T activate(T x, int kind) {
  if (kind == relu) return x < 0 ? T(0) : x;
  if (kind == elu) return x > 0 ? x : expm1(x);
  if (kind == gelu) return x * T(0.5) * erfc(-x * T(0.70710678118654752440));
  return x;
}

// The place of a sum in the result or in a partial sum.
template <typename Product>
__device__ __forceinline__ int64_t result_index(const ProductSize& size, int64_t row, int64_t column) {
  return Product::columns_adjacent ? row * size.columns + column : column * size.rows + row;
}

// Stores a whole group at once, or its first `rest` values one by one.
template <typename D, int Group>
__device__ __forceinline__ void store_group(D* address, const Sum<D> (&values)[Group], bool whole,
                                            int64_t rest) {
  if (whole) {
    store_sums(address, values);
    return;
  }
#pragma unroll
  for (int e = 0; e < Group; ++e) {
    if (e < rest) store(address + e, from_float<D>(values[e]));
  }
}

template <typename Product, int Count, typename Shape>
__global__ void __launch_bounds__(Shape::threads, 2)
    tile_product_kernel(const __grid_constant__ typename Product::Arguments a,
                        const __grid_constant__ ProductSize size, const __grid_constant__ ProductPlan plan) {
  using S = typename Product::Scalar;
  using T = Sum<S>;
  using Left = typename Product::template Left<Count, Shape>;
  using Right = typename Product::template Right<Count, Shape>;
  constexpr int row_pitch = Shape::rows + Shape::pad, column_pitch = Shape::columns + Shape::pad;
  constexpr int row_group = Shape::row_group, column_group = Shape::column_group;
  constexpr int row_groups = Shape::thread_rows / row_group,
                column_groups = Shape::thread_columns / column_group;
  PAHM_SHARED(T, left_tiles, 2 * Shape::depth * row_pitch);
  PAHM_SHARED(T, right_tiles, 2 * Shape::depth * column_pitch);

  const int64_t split = blockIdx.x % plan.splits, tile = blockIdx.x / plan.splits;
  const int64_t first_row = tile / plan.column_tiles * Shape::rows;
  const int64_t first_column = tile % plan.column_tiles * Shape::columns;
  const int64_t first_k = split * plan.split_depth;
  const int64_t depth = first_k + plan.split_depth < size.depth ? plan.split_depth : size.depth - first_k;
  const int steps = static_cast<int>((depth + Shape::depth - 1) / Shape::depth);
  Left left(a, first_row, first_k);
  Right right(a, first_column, first_k);
  TilePack<S, Count> left_packs[Left::packs], right_packs[Right::packs];

  constexpr int across = Shape::columns / Shape::thread_columns;
  const int row = static_cast<int>(threadIdx.x) / across * row_group;
  const int column = static_cast<int>(threadIdx.x) % across * column_group;
  T sums[Shape::thread_rows][Shape::thread_columns] = {};
  left.fetch(a, left_packs);
  right.fetch(a, right_packs);
  for (int step = 0; step < steps; ++step) {
    // One buffer is summed while the next is fetched; the barrier separates a buffer's writers and readers.
    const int left_buffer = step % 2 * Shape::depth * row_pitch,
              right_buffer = step % 2 * Shape::depth * column_pitch;
    put<Left, Count, row_pitch>(left_tiles, left_buffer, left_packs);
    put<Right, Count, column_pitch>(right_tiles, right_buffer, right_packs);
    __syncthreads();
    if (step + 1 < steps) {
      left.fetch(a, left_packs);
      right.fetch(a, right_packs);
    }
#pragma unroll
    for (int k = 0; k < Shape::depth; ++k) {
      Pack<T, row_group> l[row_groups];
      Pack<T, column_group> r[column_groups];
#pragma unroll
      for (int g = 0; g < row_groups; ++g)
        l[g] = load_shared<row_group>(
            left_tiles, left_buffer + k * row_pitch +
                            line_position<Left, Count>(k, g * (Shape::rows / row_groups) + row));
#pragma unroll
      for (int g = 0; g < column_groups; ++g)
        r[g] = load_shared<column_group>(
            right_tiles, right_buffer + k * column_pitch +
                             line_position<Right, Count>(k, g * (Shape::columns / column_groups) + column));
#pragma unroll
      for (int i = 0; i < Shape::thread_rows; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::thread_columns; ++j)
          sums[i][j] += l[i / row_group].values[i % row_group] * r[j / column_group].values[j % column_group];
      }
    }
  }

  T* const partial =
      plan.splits == 1 ? nullptr : static_cast<T*>(plan.partial) + split * size.rows * size.columns;
  // Neighbours in the result are stored at once.
  constexpr bool along_columns = Product::columns_adjacent;
  constexpr int group = along_columns ? column_group : row_group;
  const bool whole = Count > 1 && (along_columns ? size.columns : size.rows) % group == 0;
#pragma unroll
  for (int i = 0; i < Shape::thread_rows; i += along_columns ? 1 : row_group) {
#pragma unroll
    for (int j = 0; j < Shape::thread_columns; j += along_columns ? column_group : 1) {
      const int64_t r = first_row + i / row_group * (Shape::rows / row_groups) + row + i % row_group;
      const int64_t c =
          first_column + j / column_group * (Shape::columns / column_groups) + column + j % column_group;
      if (r >= size.rows || c >= size.columns) continue;
      const int64_t index = result_index<Product>(size, r, c);
      T values[group];
#pragma unroll
      for (int e = 0; e < group; ++e) values[e] = along_columns ? sums[i][j + e] : sums[i + e][j];
      const int64_t rest = along_columns ? size.columns - c : size.rows - r;
      if (partial != nullptr) {
        store_group<T>(partial + index, values, whole, rest);
        continue;
      }
#pragma unroll
      for (int e = 0; e < group; ++e) {
        if (e < rest) values[e] = Product::finish(a, values[e], along_columns ? c + e : c);
      }
      store_group<S>(a.out + index, values, whole, rest);
    }
  }
}

// Adds the splits in order.
template <typename Product>
__global__ void __launch_bounds__(block_threads, 4)
    add_splits_kernel(const __grid_constant__ typename Product::Arguments a,
                      const __grid_constant__ ProductSize size, const __grid_constant__ ProductPlan plan) {
  using S = typename Product::Scalar;
  using T = Sum<S>;
  const int64_t count = size.rows * size.columns;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (index >= count) return;
  T sum = 0;
  for (int64_t split = 0; split < plan.splits; ++split)
    sum += load(static_cast<const T*>(plan.partial) + split * count + index);
  const int64_t column = Product::columns_adjacent ? index % size.columns : index / size.rows;
  store(a.out + index, from_float<S>(Product::finish(a, sum, column)));
}

// ---- plans ----

// Results with at most this many columns use a special tile.
inline constexpr int narrow_columns = 4;
template <typename S>
inline constexpr int tile_depth = sizeof(S) == 2 ? 16 : 8;
template <typename S>
using WideTile = TileShape<Sum<S>, sizeof(S) == 8 ? 32 : 64, 8, sizeof(S) == 8 ? 4 : 8, tile_depth<S>>;
template <typename S>
using NarrowTile = TileShape<Sum<S>, narrow_columns, 4, 1, tile_depth<S>>;

// How often a sum over k is split: until the blocks fill the device twice, as long as no split is short and
// the splits write and read back at most half of what the product reads.
template <typename Product>
ProductPlan plan_product(const typename Product::Arguments& a, int processors) {
  using S = typename Product::Scalar;
  const ProductSize size = Product::size(a);
  const bool narrow = size.columns <= narrow_columns;
  const int64_t column_tiles = ceil_div(size.columns, narrow ? NarrowTile<S>::columns : WideTile<S>::columns);
  const int64_t tiles = ceil_div(size.rows, WideTile<S>::rows) * column_tiles;
  const int64_t partial_bytes = size.rows * size.columns * static_cast<int64_t>(sizeof(Sum<S>));
  if (tiles == 0) return {column_tiles, 1, size.depth, nullptr};  // an empty result: nothing is launched
  int64_t splits = 2 * processors / tiles;
  const auto at_most = [&](int64_t limit) { splits = limit < splits ? limit : splits; };
  at_most(Product::input_bytes(a) / (4 * partial_bytes));
  at_most(size.depth / (16 * tile_depth<S>));
  if (splits < 1) splits = 1;  // also for an empty sum
  const int64_t split_depth = ceil_div(ceil_div(size.depth, splits), tile_depth<S>) * tile_depth<S>;
  return {column_tiles, splits == 1 ? 1 : ceil_div(size.depth, split_depth), split_depth, nullptr};
}

// The size of plan.partial in bytes.
template <typename Product>
int64_t partial_bytes(const typename Product::Arguments& a, const ProductPlan& plan) {
  const ProductSize size = Product::size(a);
  return plan.splits == 1 ? 0
                          : plan.splits * size.rows * size.columns *
                                static_cast<int64_t>(sizeof(Sum<typename Product::Scalar>));
}

template <typename Product, int Count>
void product_launch(const typename Product::Arguments& a, const ProductPlan& plan, const Device& device) {
  using S = typename Product::Scalar;
  const ProductSize size = Product::size(a);
  const int64_t blocks = ceil_div(size.rows, WideTile<S>::rows) * plan.column_tiles * plan.splits;
  if (size.columns <= narrow_columns) {
    launch(tile_product_kernel<Product, Count, NarrowTile<S>>, blocks, NarrowTile<S>::threads, 0, device, a,
           size, plan);
  } else {
    launch(tile_product_kernel<Product, Count, WideTile<S>>, blocks, WideTile<S>::threads, 0, device, a, size,
           plan);
  }
  if (plan.splits == 1) return;
  launch(add_splits_kernel<Product>, ceil_div(size.rows * size.columns, block_threads), block_threads, 0,
         device, a, size, plan);
}

// Both the result and the sum over k may be empty.
template <typename Product>
void product_launch(const typename Product::Arguments& a, const ProductPlan& plan, const Device& device) {
  constexpr int wide = 16 / sizeof(typename Product::Scalar);
  if (Product::wide(a, wide)) {
    product_launch<Product, wide>(a, plan, device);
  } else {
    product_launch<Product, 1>(a, plan, device);
  }
}

}  // namespace pahm
