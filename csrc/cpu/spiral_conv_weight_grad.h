// The weight gradient of spiral_conv. Compiled once per instruction set (cpu/foreach_isa.h): no guard.
//
// A tile of the result is a sum of outer products over many rows. With rows a large power of two apart, the
// lines of one panel would share a few sets of the cache. So both operands are packed, a block of rows at a
// time, and a tile reads them from consecutive memory.
namespace pahm::PAHM_ISA {

// The output channels of tile `i` of `tiles` begin here. No tile is much smaller than another, because a few
// rows of results alone would not fill the multipliers' pipelines.
inline int64_t weight_tile_begin(const SpiralShape& s, int64_t i, int64_t tiles) {
  return i * s.out_channels / tiles;
}

// With at most this many output channels, panels are twice as wide to fill the register file.
inline constexpr int wide_rows = 3;

// Channels of a panel of x.
template <typename T>
int64_t weight_panel_width(const SpiralShape& s) {
  return s.out_channels <= wide_rows ? 2 * panel_width<T> : panel_width<T>;
}

// A panel's width in memory: vectors that no column needs are left out.
template <typename T>
int64_t weight_stored_width(const SpiralShape& s, int64_t columns) {
  return columns > panel_width<T> ? weight_panel_width<T>(s) : stored_width<T>(columns);
}

// How many rows to process at a time, and the number of items.
template <typename T>
void spiral_weight_grad_plan(SpiralWeightGrad<T>& a, int64_t& items) {
  // Packed operands of one tile that stay in a first-level cache while they are used L times.
  constexpr int64_t block_bytes = 40 * 1024, most_rows = 1024;
  const SpiralShape& s = a.shape;
  const int64_t panel = weight_panel_width<T>(s), chunks = ceil_div(s.rows, most_rows);
  a.rows = ceil_div(s.rows, chunks);
  const int64_t mesh_bytes = a.rows * (tile_rows + panel) * static_cast<int64_t>(sizeof(T));
  a.meshes = chunks > 1 ? 1 : std::clamp<int64_t>(block_bytes / mesh_bytes, 1, s.batch);
  items = ceil_div(s.channels, panel) * ceil_div(s.out_channels, tile_rows) * s.length;
}

// Packs rows of `channels` numbers, those that `vertices` lists or the first `count`: (count, width), zero
// beyond `columns`.
template <typename T>
void spiral_pack_rows(const T* x, int64_t channels, const int32_t* vertices, int64_t count, int64_t columns,
                      int64_t width, T* panel) {
  for (int64_t i = 0; i < count; ++i, panel += width) {
    const T* row = x + (vertices == nullptr ? i : vertices[i]) * channels;
    int64_t c = 0;
    for (; c + lanes<T> <= columns; c += lanes<T>) store(panel + c, load(row + c));
    for (; c < width; c += lanes<T>) store(panel + c, load_first(row + c, std::max<int64_t>(0, columns - c)));
  }
}

// Packs tiles [first, last) of rows of grad: (tiles, rows, tile_rows). A tile's numbers past its own are
// never read.
template <typename T>
void spiral_pack_grad(const SpiralShape& s, const T* grad, int64_t rows, int64_t tiles, int64_t first,
                      int64_t last, T* packed) {
  constexpr int64_t at_once = 16;
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    const int64_t end = std::min(rows, begin + at_once);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t o = weight_tile_begin(s, tile, tiles);
      const T* from = grad + begin * s.out_channels + o;
      T* to = packed + ((tile - first) * rows + begin) * tile_rows;
      const int64_t left = s.out_channels - o;
      for (int64_t row = begin; row < end; ++row, from += s.out_channels, to += tile_rows) {
        if (left >= tile_rows) {
          std::memcpy(to, from, tile_rows * sizeof(T));
        } else {
          for (int64_t i = 0; i < left; ++i) to[i] = from[i];
        }
      }
    }
  }
}

// One tile's factors: packed rows of grad, and a panel of x with the packed row that belongs to each of them.
template <typename T>
struct SpiralFactors {
  const T* grad;          // (meshes, rows, tile_rows)
  const T* panel;         // (meshes, packed, NV vectors)
  const int32_t* places;  // (rows), for every mesh
  int64_t meshes, rows, packed;
};

// sums (MR, NV vectors) = MR columns of grad, transposed, times the rows of the panel. This is a separate
// function because, inlined, its accumulators would not all get a register.
template <typename T, int MR, int NV>
__attribute__((noinline)) void outer_products(const SpiralFactors<T>& f, T* sums) {
  const T* grad = f.grad;
  const T* panel = f.panel;
  Vec<T> acc[MR][NV] = {};
  for (int64_t mesh = 0; mesh < f.meshes; ++mesh, panel += f.packed * NV * lanes<T>) {
    for (int64_t row = 0; row < f.rows; ++row, grad += tile_rows) {
      const T* source = panel + int64_t{f.places[row]} * (NV * lanes<T>);
      // The fewer factors wait in registers for the more numerous.
      if constexpr (MR < NV) {
        Vec<T> scalars[MR];
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) scalars[i] = broadcast(grad[i]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const Vec<T> value = load(source + v * lanes<T>);
#pragma GCC unroll 4
          for (int i = 0; i < MR; ++i) acc[i][v] += scalars[i] * value;
        }
      } else {
        Vec<T> values[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) values[v] = load(source + v * lanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const Vec<T> scalar = broadcast(grad[i]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[i][v] += scalar * values[v];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(sums + (i * NV + v) * lanes<T>, acc[i][v]);
  }
}

// outer_products for each number of output channels up to sizeof...(I).
template <typename T, int NV, size_t... I>
inline void outer_products_of(int64_t channels, const SpiralFactors<T>& f, T* sums,
                              std::index_sequence<I...>) {
  constexpr void (*products[])(const SpiralFactors<T>&, T*) = {outer_products<T, I + 1, NV>...};
  products[channels - 1](f, sums);
}

// Items begin to end of (panels, tiles of output channels, L). One thread sums each item over all meshes in a
// fixed order; all threads walk through the flattened rows in the same blocks.
template <typename T>
void spiral_weight_grad(const SpiralWeightGrad<T>& a, int64_t begin, int64_t end) {
  const SpiralShape& s = a.shape;
  const int64_t tiles = ceil_div(s.out_channels, tile_rows), K = s.length * s.channels;
  const int64_t per_panel = tiles * s.length, first_panel = begin / per_panel;
  const bool one_panel = (end - 1) / per_panel == first_panel;
  const int64_t first_tile = one_panel ? begin / s.length % tiles : 0;
  const int64_t last_tile = one_panel ? (end - 1) / s.length % tiles + 1 : tiles;
  // Where a mesh has many more vertices than its spirals have entries, only those are packed.
  const bool all_vertices = s.vertices <= s.length * a.rows;
  const int64_t packed = all_vertices ? s.vertices : s.length * a.rows;
  const Scratch<T> grad(a.meshes * a.rows * (last_tile - first_tile) * tile_rows);
  const int64_t panel_columns = weight_panel_width<T>(s);
  const Scratch<T> panel(a.meshes * packed * panel_columns);
  alignas(PAHM_VECTOR_BYTES) T sums[tile_rows * panel_width<T>];
  const Scratch<int32_t> in_order(all_vertices ? 0 : packed);
  if (!all_vertices) std::iota(in_order.get(), in_order.get() + packed, 0);

  for (int64_t b = 0; b < s.batch; b += a.meshes) {
    for (int64_t m = 0; m < s.rows; m += a.rows) {
      const int64_t meshes = std::min(a.meshes, s.batch - b), rows = std::min(a.rows, s.rows - m);
      spiral_pack_grad(s, a.grad + (b * s.rows + m) * s.out_channels, meshes * rows, tiles, first_tile,
                       last_tile, grad.get());
      for (int64_t item = begin; item < end; ++item) {
        const int64_t column = item / per_panel * panel_columns;
        const int64_t width = weight_stored_width<T>(s, s.channels - column);
        const int64_t columns = std::min(width, s.channels - column);
        if (item == begin || item % per_panel == 0) {
          for (int64_t mesh = 0; mesh < meshes; ++mesh) {
            const T* x = a.x + (b + mesh) * s.vertices * s.channels + column;
            T* to = panel.get() + mesh * packed * width;
            if (all_vertices) {
              spiral_pack_rows<T>(x, s.channels, nullptr, packed, columns, width, to);
            } else {
              for (int64_t l = 0; l < s.length; ++l, to += a.rows * width) {
                spiral_pack_rows(x, s.channels, a.table + l * s.rows + m, rows, columns, width, to);
              }
            }
          }
        }
        const int64_t tile = item / s.length % tiles, l = item % s.length;
        const int64_t o = weight_tile_begin(s, tile, tiles);
        const int64_t channels = weight_tile_begin(s, tile + 1, tiles) - o;
        T* out = a.out + o * K + l * s.channels + column;
        for (int64_t i = 0; i < channels; ++i) __builtin_prefetch(out + i * K, 1);
        const SpiralFactors<T> factors{grad.get() + (tile - first_tile) * meshes * rows * tile_rows,
                                       panel.get(),
                                       all_vertices ? a.table + l * s.rows + m : in_order.get() + l * a.rows,
                                       meshes,
                                       rows,
                                       packed};
        if (width > panel_width<T>) {
          outer_products_of<T, 4>(channels, factors, sums, std::make_index_sequence<wide_rows>{});
        } else if (width > lanes<T>) {
          outer_products_of<T, 2>(channels, factors, sums, std::make_index_sequence<tile_rows>{});
        } else {
          outer_products_of<T, 1>(channels, factors, sums, std::make_index_sequence<tile_rows>{});
        }
        const bool add = b > 0 || m > 0;
        for (int64_t i = 0; i < channels; ++i, out += K) {
          for (int64_t v = 0; v < columns; v += lanes<T>) {
            const Vec<T> sum = load(sums + i * width + v);
            const int64_t left = columns - v;
            if (left >= lanes<T>) {
              store(out + v, add ? load(out + v) + sum : sum);
            } else {
              store_first(out + v, add ? load_first(out + v, left) + sum : sum, left);
            }
          }
        }
      }
    }
  }
}

}  // namespace pahm::PAHM_ISA
