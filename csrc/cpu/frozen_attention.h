// Attention of a frozen network. Compiled once per instruction set (cpu/foreach_isa.h): no guard.
namespace pahm::PAHM_ISA {

inline int64_t item_count(const Attention& a) { return a.batch * a.heads; }

// Replaces each of `count` scores by its exponential after the largest was subtracted; gives their sum. The
// last vector may have scores beyond `count`, which become zero.
inline float exponentials(float* scores, int64_t count) {
  constexpr int64_t n = lanes<float>;
  const int64_t padded = (count + n - 1) / n * n;
  for (int64_t j = count; j < padded; ++j) scores[j] = -std::numeric_limits<float>::infinity();
  Vec<float> most = load(scores);
  for (int64_t j = n; j < padded; j += n) {
    const Vec<float> v = load(scores + j);
    most = most > v ? most : v;
  }
  float largest = most[0];
  for (int i = 1; i < n; ++i) largest = std::max(largest, most[i]);
  Vec<float> sum = {};
  for (int64_t j = 0; j < padded; j += n) {
    const Vec<float> v = exponential(load(scores + j) - largest);
    store(scores + j, v);
    sum += v;
  }
  return sum_lanes<float>(sum);
}

// One head of one batch item: scores of a tile of rows with all keys, their softmax, its product with v.
inline void attend(const Attention& a, int64_t b, int64_t head, float* scratch) {
  constexpr int64_t n = lanes<float>, width = panel_width<float>;
  const int64_t N = a.vertices, D = a.channels, first = b * N, channel = head * D;
  const int64_t key_panels = (N + width - 1) / width, value_panels = (D + width - 1) / width;
  float* keys = scratch;                          // (key_panels, D, width)
  float* values = keys + key_panels * D * width;  // (value_panels, N, width)
  float* scores = values + value_panels * N * width;
  const int64_t stride = key_panels * width;

  const auto scale = static_cast<float>(a.scale);
  std::memset(keys + (key_panels - 1) * D * width, 0, static_cast<size_t>(D * width) * sizeof(float));
  for (int64_t j = 0; j < N; ++j) {
    const float* key = a.k.row(first + j) + channel;
    float* out = keys + j / width * D * width + j % width;
    for (int64_t d = 0; d < D; ++d) out[d * width] = scale * key[d];
  }
  std::memset(values, 0, static_cast<size_t>(value_panels * N * width) * sizeof(float));
  for (int64_t j = 0; j < N; ++j) {
    const float* value = a.v.row(first + j) + channel;
    for (int64_t p = 0; p < value_panels; ++p) {
      const int64_t count = std::min(width, D - p * width);
      std::memcpy(values + (p * N + j) * width, value + p * width,
                  static_cast<size_t>(count) * sizeof(float));
    }
  }

  for (int64_t row = 0; row < N; row += tile_rows) {
    const int64_t count = std::min<int64_t>(tile_rows, N - row);
    const float* rows[tile_rows];
    for (int i = 0; i < tile_rows; ++i) {
      rows[i] = a.q.row(first + row + std::min<int64_t>(i, count - 1)) + channel;
    }
    for (int64_t p = 0; p < key_panels; ++p) {
      Vec<float> acc[tile_rows][2] = {};
      multiply<float, tile_rows, 2>(acc, rows, keys + p * D * width, D);
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i) {
        store(scores + i * stride + p * width, acc[i][0]);
        store(scores + i * stride + p * width + n, acc[i][1]);
      }
    }
    float sums[tile_rows];
    for (int i = 0; i < tile_rows; ++i) {
      sums[i] = exponentials(scores + i * stride, N);
      rows[i] = scores + i * stride;
    }
    for (int64_t p = 0; p < value_panels; ++p) {
      Vec<float> acc[tile_rows][2] = {};
      multiply<float, tile_rows, 2>(acc, rows, values + p * N * width, N);
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i) {
        if (i >= count) break;
        float* out = a.out.row(first + row + i) + channel + p * width;
        const float share = 1 / sums[i];
        for (int v = 0; v < 2; ++v) {
          const int64_t left = D - p * width - v * n;
          if (left > 0) store_upto(out + v * n, acc[i][v] * share, left);
        }
      }
    }
  }
}

inline void run_items(const Attention& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    attend(a, item / a.heads, item % a.heads, a.scratch + item * attention_scratch(a.vertices, a.channels));
  }
}

}  // namespace pahm::PAHM_ISA
