// spiral_conv and its gradients in bfloat16, summed in float32. Compiled once, by spiral_conv_bf16.cpp.
//
// All three are products of blocks of 32 rows by 32 columns. Rows that the spiral table scatters are copied
// into contiguous working memory for one block only, so that it stays in the cache.
namespace pahm::PAHM_ISA {

// Numbers along the sum to process before moving to the next block of results: the weights for this many stay
// in the first-level cache for that block.
inline constexpr int64_t depth_block = 256;

// ---- forward ----

// One panel of 32 output channels and one place of the spiral: weight (Cout, L * C) as (C padded / 2, 32, 2).
inline void pack_forward(const SpiralForwardBf16& a, const BFloat16* weight, BFloat16* packed, int64_t panel,
                         int64_t l) {
  const SpiralShape& s = a.shape;
  const int64_t K = s.length * s.channels, first = panel * block_columns;
  const int64_t columns = std::min(block_columns, s.out_channels - first);
  BFloat16* const out = packed + (panel * s.length + l) * a.depth * block_columns;
  const BFloat16* const in = weight + first * K + l * s.channels;
  if (columns < block_columns || s.channels < a.depth) {
    std::memset(static_cast<void*>(out), 0, static_cast<size_t>(a.depth * block_columns) * sizeof(BFloat16));
  }
  if (s.channels % 2 == 0 && reinterpret_cast<uintptr_t>(in) % alignof(float) == 0) {
    // Move pairs as 32-bit numbers.
    transpose(reinterpret_cast<const float*>(in), K / 2, columns, s.channels / 2,
              reinterpret_cast<float*>(out), block_columns);
    return;
  }
  for (int64_t o = 0; o < columns; ++o) {
    for (int64_t c = 0; c < s.channels; ++c) {
      out[(c / 2 * block_columns + o) * 2 + c % 2] = in[o * K + c];
    }
  }
}

// Copies the spirals of 32 rows from `first_row` of the flattened (B, M), each (L, depth). Rows past the end
// repeat the last.
inline void gather_spirals(const SpiralForwardBf16& a, int64_t first_row, BFloat16* gathered) {
  const SpiralShape& s = a.shape;
  const int64_t last = s.batch * s.rows - 1;
  for (int64_t i = 0; i < block_rows; ++i) {
    const int64_t row = std::min(first_row + i, last);
    const BFloat16* const x = a.x + row / s.rows * s.vertices * s.channels;
    const int32_t* const place = a.table + row % s.rows;
    for (int64_t l = 0; l < s.length; ++l, gathered += a.depth) {
      const BFloat16* const source = x + place[l * s.rows] * s.channels;
      int64_t c = 0;
      for (; c + 32 <= s.channels; c += 32) _mm512_storeu_si512(gathered + c, _mm512_loadu_si512(source + c));
      if (c < s.channels) {
        const __mmask32 mask = (1u << (s.channels - c)) - 1;
        _mm512_storeu_si512(gathered + c, _mm512_maskz_loadu_epi16(mask, source + c));
      }
    }
  }
}

// Bias, activation and rounding of a block of sums.
inline void finish_block(const SpiralForwardBf16& a, const float* sums, int64_t first_row, int64_t column) {
  const SpiralShape& s = a.shape;
  const int64_t count = std::min(block_rows, s.batch * s.rows - first_row);
  for (int64_t v = 0; v < block_columns && column + v < s.out_channels; v += 16) {
    const int64_t left = std::min<int64_t>(16, s.out_channels - column - v);
    const Vec<float> bias = a.bias == nullptr ? Vec<float>{} : load_first(a.bias + column + v, left);
    for (int64_t i = 0; i < count; ++i) {
      const Vec<float> value = activate<float>(load(sums + i * block_columns + v) + bias, a.activation);
      BFloat16* const out = a.out + (first_row + i) * s.out_channels + column + v;
      if (left == 16) {
        store(out, value);
      } else {
        store_first(out, value, left);
      }
    }
  }
}

// Blocks begin to end, each of 32 rows of the flattened (B, M). At most a.group are gathered at a time.
template <Unit U>
void spiral_forward_bf16(const SpiralForwardBf16& a, int64_t begin, int64_t end) {
  [[maybe_unused]] const Setup<U> setup;
  const SpiralShape& s = a.shape;
  const int64_t depth = s.length * a.depth, panels = ceil_div(s.out_channels, block_columns);
  const Scratch<BFloat16> gathered(a.group * block_rows * depth);
  const Scratch<float> sums(a.group * block_rows * block_columns);
  for (int64_t first = begin; first < end; first += a.group) {
    const int64_t blocks = std::min(a.group, end - first);
    for (int64_t i = 0; i < blocks; ++i) {
      gather_spirals(a, (first + i) * block_rows, gathered.get() + i * block_rows * depth);
    }
    for (int64_t p = 0; p < panels; ++p) {
      const BFloat16* const panel = a.packed + p * depth * block_columns;
      for (int64_t k = 0; k < depth; k += depth_block) {
        for (int64_t i = 0; i < blocks; ++i) {
          block_product<U>(gathered.get() + i * block_rows * depth + k, depth, panel + k * block_columns,
                           std::min(depth_block, depth - k), sums.get() + i * block_rows * block_columns,
                           k > 0);
        }
      }
      for (int64_t i = 0; i < blocks; ++i) {
        finish_block(a, sums.get() + i * block_rows * block_columns, (first + i) * block_rows,
                     p * block_columns);
      }
    }
  }
}

// ---- gradient to the input ----

// One panel of 32 input channels and one place of the spiral: weight (Cout, L * C) as (Cout padded / 2, 32,
// 2).
inline void pack_input_grad(const SpiralInputGradBf16& a, const BFloat16* weight, BFloat16* packed,
                            int64_t panel, int64_t l) {
  const SpiralShape& s = a.shape;
  const int64_t K = s.length * s.channels, first = panel * block_columns;
  const int64_t columns = std::min(block_columns, s.channels - first);
  BFloat16* out = packed + (panel * s.length + l) * a.depth * block_columns;
  for (int64_t o = 0; o < a.depth; o += 2, out += 2 * block_columns) {
    const BFloat16* const row = weight + o * K + l * s.channels + first;
    interleave(o < s.out_channels ? row : nullptr, o + 1 < s.out_channels ? row + K : nullptr, columns, out);
  }
}

// Items begin to end of (B, panels). A row's product is added to the vertices of its spiral in a fixed order.
template <Unit U>
void spiral_input_grad_bf16(const SpiralInputGradBf16& a, int64_t begin, int64_t end) {
  [[maybe_unused]] const Setup<U> setup;
  const SpiralShape& s = a.shape;
  const int64_t panels = ceil_div(s.channels, block_columns), padded_rows = ceil_div(s.rows, block_rows) * 32;
  const Scratch<BFloat16> grad(padded_rows * a.depth);
  const Scratch<float> sums(s.vertices * block_columns), product(block_rows * block_columns);
  std::memset(static_cast<void*>(grad.get()), 0,
              static_cast<size_t>(padded_rows * a.depth) * sizeof(BFloat16));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / panels, first = item % panels * block_columns;
    if (s.out_channels > 0 && (item == begin || item % panels == 0)) {
      for (int64_t m = 0; m < s.rows; ++m) {
        std::memcpy(static_cast<void*>(grad.get() + m * a.depth), a.grad + (b * s.rows + m) * s.out_channels,
                    static_cast<size_t>(s.out_channels) * sizeof(BFloat16));
      }
    }
    std::memset(sums.get(), 0, static_cast<size_t>(s.vertices * block_columns) * sizeof(float));
    const BFloat16* weight = a.packed + item % panels * s.length * a.depth * block_columns;
    for (int64_t l = 0; l < s.length; ++l, weight += a.depth * block_columns) {
      for (int64_t m = 0; m < s.rows; m += block_rows) {
        block_product<U>(grad.get() + m * a.depth, a.depth, weight, a.depth, product.get(), false);
        const int64_t count = std::min(block_rows, s.rows - m);
        for (int64_t i = 0; i < count; ++i) {
          const float* const row = product.get() + i * block_columns;
          float* const target = sums.get() + a.table[l * s.rows + m + i] * block_columns;
          store(target, load(target) + load(row));
          store(target + 16, load(target + 16) + load(row + 16));
        }
      }
    }
    const int64_t columns = std::min(block_columns, s.channels - first);
    for (int64_t n = 0; n < s.vertices; ++n) {
      BFloat16* const out = a.out + (b * s.vertices + n) * s.channels + first;
      for (int64_t v = 0; v < columns; v += 16) {
        store_first(out + v, load(sums.get() + n * block_columns + v), std::min<int64_t>(16, columns - v));
      }
    }
  }
}

// ---- gradient to the weight ----

// Rows of the flattened (B, M) to process at a time.
inline constexpr int64_t sum_block = 512;
// The stride between channels of the transposed output gradient. With a power of two all addresses would fall
// into a few sets of the cache.
inline constexpr int64_t sum_stride = sum_block + depth_step;

// The output gradient's rows first to last, transposed: (Cout padded, sum_stride), zero past the end.
inline void transpose_grad(const SpiralWeightGradBf16& a, int64_t first, int64_t last, BFloat16* pairs,
                           BFloat16* out) {
  const SpiralShape& s = a.shape;
  const int64_t width = ceil_div(s.out_channels, block_columns) * block_columns;
  for (int64_t row = first; row < last; row += block_rows) {
    for (int64_t r = row; r < row + block_rows; r += 2) {
      for (int64_t o = 0; o < width; o += block_columns) {
        const BFloat16* const grad = a.grad + r * s.out_channels + o;
        interleave(r < last ? grad : nullptr, r + 1 < last ? grad + s.out_channels : nullptr,
                   std::min(block_columns, s.out_channels - o), pairs + (r - row) * width + 2 * o);
      }
    }
    transpose(reinterpret_cast<const float*>(pairs), width, block_rows / 2, width,
              reinterpret_cast<float*>(out + row - first), sum_stride / 2);
  }
}

// Items begin to end of (L, panels of 32 input channels). One thread sums each item over all meshes in a
// fixed order; all threads walk through the rows in blocks.
template <Unit U>
void spiral_weight_grad_bf16(const SpiralWeightGradBf16& a, int64_t begin, int64_t end) {
  [[maybe_unused]] const Setup<U> setup;
  const SpiralShape& s = a.shape;
  const int64_t panels = ceil_div(s.channels, block_columns), rows = s.batch * s.rows;
  const int64_t width = ceil_div(s.out_channels, block_columns) * block_columns;
  const Scratch<BFloat16> grad(width * sum_stride), pairs(block_rows * width), x(sum_block * block_columns);
  const Scratch<float> sums((end - begin) * width * block_columns);
  for (int64_t first = 0; first < rows; first += sum_block) {
    const int64_t last = std::min(rows, first + sum_block);
    const int64_t depth = ceil_div(last - first, depth_step) * depth_step;
    transpose_grad(a, first, last, pairs.get(), grad.get());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t l = item / panels, column = item % panels * block_columns;
      const int64_t columns = std::min(block_columns, s.channels - column);
      const auto row = [&](int64_t r) -> const BFloat16* {
        if (r >= last) return nullptr;
        const int64_t vertex = r / s.rows * s.vertices + a.table[l * s.rows + r % s.rows];
        return a.x + vertex * s.channels + column;
      };
      for (int64_t r = 0; r < depth; r += 2) {
        interleave(row(first + r), row(first + r + 1), columns, x.get() + r * block_columns);
      }
      float* const out = sums.get() + (item - begin) * width * block_columns;
      for (int64_t o = 0; o < width; o += block_rows) {
        block_product<U>(grad.get() + o * sum_stride, sum_stride, x.get(), depth, out + o * block_columns,
                         first > 0);
      }
    }
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t l = item / panels, column = item % panels * block_columns;
    const int64_t columns = std::min(block_columns, s.channels - column);
    const float* const sum = sums.get() + (item - begin) * width * block_columns;
    for (int64_t o = 0; o < s.out_channels; ++o) {
      BFloat16* const out = a.out + (o * s.length + l) * s.channels + column;
      for (int64_t v = 0; v < columns; v += 16) {
        store_first(out + v, load(sum + o * block_columns + v), std::min<int64_t>(16, columns - v));
      }
    }
  }
}

}  // namespace pahm::PAHM_ISA
