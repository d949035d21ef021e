// The product of a frozen network. Compiled once per instruction set (cpu/foreach_isa.h): no guard.
namespace pahm::PAHM_ISA {

// Cuts a product into tiles: as few blocks of rows as the register file allows, all about as high.
inline void cut(Product& a) {
  a.row_tiles = (a.batch * a.rows + tile_rows - 1) / tile_rows;
  a.panels = (a.columns + panel_width<float> - 1) / panel_width<float>;
  // All panels of a block of rows share its rows in the cache, if the weights fit there as well.
  constexpr int64_t cached_floats = 1 << 15;
  a.panels_outside = a.inputs * a.columns > cached_floats;
}

inline int64_t item_count(const Product& a) { return a.row_tiles * a.panels; }

// Writes a vector of sums to row `row` and the channels from `column`, of which `left` are real.
template <typename Step>
inline __attribute__((always_inline)) void finish(const Step& a, int64_t row, int64_t column, int64_t left,
                                                  Vec<float> sum) {
  if (a.residual == Residual::none) {
    sum = activate<float>(sum, a.activation);
  } else {
    const Vec<float> added = load_upto(a.added.row(row) + column, left);
    sum = a.residual == Residual::before_activation ? activate<float>(sum + added, a.activation)
                                                    : activate<float>(sum, a.activation) + added;
  }
  store_upto(a.out.row(row) + column, sum, left);
}

// MR rows from `first` by NV vectors of output channels from `column`.
template <int MR, int NV>
void product_tile(const Product& a, const float* panel, int64_t first, int64_t column) {
  constexpr int64_t n = lanes<float>;
  int64_t item[MR], place[MR];
  int64_t b = first / a.rows, r = first % a.rows;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    item[i] = b;
    place[i] = r;
    if (++r == a.rows) {
      r = 0;
      ++b;
    }
  }
  Vec<float> acc[MR][NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    const Vec<float> bias = load(a.bias + column + v * n);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) acc[i][v] = bias;
  }
  for (int64_t s = 0; s < a.source_count; ++s) {
    const ProductSource& source = a.sources[s];
    const float* rows[MR];
    if (source.table == nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) rows[i] = source.in.row(item[i] * source.rows + place[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const int64_t index = source.table[place[i]];
        rows[i] = index < 0 ? a.zeros : source.in.row(item[i] * source.rows + index);
      }
    }
    multiply<float, MR, NV>(acc, rows, panel, source.channels);
    panel += source.channels * NV * n;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      finish(a, first + i, column + v * n, a.columns - column - v * n, acc[i][v]);
    }
  }
}

template <int MR>
void product_rows(const Product& a, const float* panel, int64_t first, int64_t count, int64_t column) {
  if constexpr (MR > 1) {
    if (count < MR) return product_rows<MR - 1>(a, panel, first, count, column);
  }
  if (a.columns - column > lanes<float>) {
    product_tile<MR, 2>(a, panel, first, column);
  } else {
    product_tile<MR, 1>(a, panel, first, column);
  }
}

inline void run_items(const Product& a, int64_t begin, int64_t end) {
  const int64_t rows = a.batch * a.rows, height = rows / a.row_tiles, higher = rows % a.row_tiles;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = a.panels_outside ? item / a.row_tiles : item % a.panels;
    const int64_t tile = a.panels_outside ? item % a.row_tiles : item / a.panels;
    const int64_t first = tile * height + std::min(tile, higher), column = panel * panel_width<float>;
    product_rows<tile_rows>(a, a.weight + column * a.inputs, first, height + (tile < higher ? 1 : 0), column);
  }
}

}  // namespace pahm::PAHM_ISA
