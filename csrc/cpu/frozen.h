// Kernels of a frozen network's steps. Compiled once per instruction set (cpu/foreach_isa.h): no guard.
// clang-format off
#include "cpu/activation.h"
#include "cpu/product.h"
#include "cpu/frozen_product.h"
#include "cpu/frozen_winograd.h"
#include "cpu/frozen_attention.h"
#include "cpu/vertex_sample.h"
// clang-format on

namespace pahm::PAHM_ISA {

// ---- convolutions of each channel ----

// Channels of a depthwise convolution that make an item.
inline constexpr int64_t depthwise_block = 64;

inline int64_t item_count(const Depthwise& a) {
  return a.batch * a.out_height * ((a.channels + depthwise_block - 1) / depthwise_block);
}

// P output pixels side by side, V vectors of channels from c, taps [ky0, ky1) x [kx0, kx1). `in` is the input
// pixel under the kernel's corner for the first of them; it may lie outside the map where no tap is.
template <int P, int V>
inline __attribute__((always_inline)) void depthwise_pixels(const Depthwise& a, const float* in, int64_t c,
                                                            int64_t ky0, int64_t ky1, int64_t kx0,
                                                            int64_t kx1, float* out, int64_t count) {
  constexpr int64_t n = lanes<float>;
  const int64_t step = a.stride_x * a.in.stride;
  Vec<float> acc[P][V];
  for (int v = 0; v < V; ++v) {
    const Vec<float> bias = load_upto(a.bias + c + v * n, count - v * n);
    for (int p = 0; p < P; ++p) acc[p][v] = bias;
  }
  for (int64_t ky = ky0; ky < ky1; ++ky) {
    for (int64_t kx = kx0; kx < kx1; ++kx) {
      const float* weight = a.weight + (ky * a.kernel_width + kx) * a.channels + c;
      const float* source = in + (ky * a.width + kx) * a.in.stride + c;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<float> w = load_upto(weight + v * n, count - v * n);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[p][v] += w * load_upto(source + p * step + v * n, count - v * n);
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < V; ++v) {
      store_upto(out + p * a.out.stride + c + v * n, activate<float>(acc[p][v], a.activation), count - v * n);
    }
  }
}

template <int P>
inline __attribute__((always_inline)) void depthwise_channels(const Depthwise& a, const float* in,
                                                              int64_t first, int64_t last, int64_t ky0,
                                                              int64_t ky1, int64_t kx0, int64_t kx1,
                                                              float* out) {
  constexpr int64_t n = lanes<float>;
  constexpr int wide = P == 1 ? 4 : 2;  // sums in flight hide the latency of an addition
  int64_t c = first;
  // A constant count takes the branches for partial vectors out of the loops.
  for (; c + wide * n <= last; c += wide * n) {
    depthwise_pixels<P, wide>(a, in, c, ky0, ky1, kx0, kx1, out, wide * n);
  }
  for (; c + n <= last; c += n) depthwise_pixels<P, 1>(a, in, c, ky0, ky1, kx0, kx1, out, n);
  if (c < last) depthwise_pixels<P, 1>(a, in, c, ky0, ky1, kx0, kx1, out, last - c);
}

inline void run_items(const Depthwise& a, int64_t begin, int64_t end) {
  constexpr int pixels = 4;
  const int64_t blocks = (a.channels + depthwise_block - 1) / depthwise_block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, b = row / a.out_height, oy = row % a.out_height;
    const int64_t first = item % blocks * depthwise_block;
    const int64_t last = std::min(a.channels, first + depthwise_block);
    const int64_t y = oy * a.stride_y - a.top;
    const int64_t ky0 = std::max<int64_t>(0, -y), ky1 = std::min(a.kernel_height, a.height - y);
    const float* in = a.in.row((b * a.height + y) * a.width);
    for (int64_t ox = 0; ox < a.out_width;) {
      const int64_t x = ox * a.stride_x - a.left;
      const float* corner = in + x * a.in.stride;
      float* out = a.out.row(row * a.out_width + ox);
      const int64_t right = x + (pixels - 1) * a.stride_x + a.kernel_width;
      if (x >= 0 && right <= a.width && ox + pixels <= a.out_width) {
        depthwise_channels<pixels>(a, corner, first, last, ky0, ky1, 0, a.kernel_width, out);
        ox += pixels;
      } else {
        const int64_t kx0 = std::max<int64_t>(0, -x), kx1 = std::min(a.kernel_width, a.width - x);
        depthwise_channels<1>(a, corner, first, last, ky0, ky1, kx0, kx1, out);
        ox += 1;
      }
    }
  }
}

// ---- maps ----

inline int64_t item_count(const MaxPool& a) { return a.batch * a.out_height; }

inline void run_items(const MaxPool& a, int64_t begin, int64_t end) {
  constexpr int64_t n = lanes<float>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.out_height, y = row % a.out_height * a.stride_y - a.top;
    const int64_t ky0 = std::max<int64_t>(0, -y), ky1 = std::min(a.kernel_height, a.height - y);
    for (int64_t ox = 0; ox < a.out_width; ++ox) {
      const int64_t x = ox * a.stride_x - a.left;
      const int64_t kx0 = std::max<int64_t>(0, -x), kx1 = std::min(a.kernel_width, a.width - x);
      float* out = a.out.row(row * a.out_width + ox);
      for (int64_t c = 0; c < a.channels; c += n) {
        Vec<float> most = broadcast(-std::numeric_limits<float>::infinity());
        for (int64_t ky = ky0; ky < ky1; ++ky) {
          for (int64_t kx = kx0; kx < kx1; ++kx) {
            const float* in = a.in.row((b * a.height + y + ky) * a.width + x + kx);
            const Vec<float> v = load_upto(in + c, a.channels - c);
            most = (v > most) | (v != v) ? v : most;  // NaN stays
          }
        }
        store_upto(out + c, most, a.channels - c);
      }
    }
  }
}

inline int64_t item_count(const Pad& a) { return a.batch * a.out_height; }

inline void run_items(const Pad& a, int64_t begin, int64_t end) {
  const auto pixel = static_cast<size_t>(a.channels) * sizeof(float);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.out_height, y = row % a.out_height - a.top;
    for (int64_t ox = 0; ox < a.out_width; ++ox) {
      const int64_t x = ox - a.left;
      float* out = a.out.row(row * a.out_width + ox);
      if (y >= 0 && y < a.height && x >= 0 && x < a.width) {
        std::memcpy(out, a.in.row((b * a.height + y) * a.width + x), pixel);
      } else {
        std::memset(out, 0, pixel);
      }
    }
  }
}

inline int64_t item_count(const Upsample& a) { return a.batch * a.out_height; }

// The two pixels that an output pixel lies between, and the share of the second.
inline float between(int64_t i, int64_t in, int64_t out, int64_t& first, int64_t& second) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  const float place = std::max(0.0f, scale * (static_cast<float>(i) + 0.5f) - 0.5f);
  first = std::min(static_cast<int64_t>(place), in - 1);
  second = std::min(first + 1, in - 1);
  return place - static_cast<float>(first);
}

inline void run_items(const Upsample& a, int64_t begin, int64_t end) {
  constexpr int64_t n = lanes<float>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.out_height;
    int64_t y[2], x[2];
    const float fy = between(row % a.out_height, a.height, a.out_height, y[0], y[1]);
    for (int64_t ox = 0; ox < a.out_width; ++ox) {
      const float fx = between(ox, a.width, a.out_width, x[0], x[1]);
      const float weight[4] = {(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx};
      const float* in[4];
      for (int k = 0; k < 4; ++k) in[k] = a.in.row((b * a.height + y[k >> 1]) * a.width + x[k & 1]);
      float* out = a.out.row(row * a.out_width + ox);
      for (int64_t c = 0; c < a.channels; c += n) {
        Vec<float> sum = {};
        for (int k = 0; k < 4; ++k) sum += weight[k] * load_upto(in[k] + c, a.channels - c);
        store_upto(out + c, sum, a.channels - c);
      }
    }
  }
}

// ---- rows ----

inline int64_t item_count(const Norm& a) { return a.rows; }

inline void run_items(const Norm& a, int64_t begin, int64_t end) {
  constexpr int64_t n = lanes<float>;
  const int64_t whole = a.channels / n * n;
  for (int64_t row = begin; row < end; ++row) {
    const float* in = a.in.row(row);
    float* out = a.out.row(row);
    Vec<float> sums = {}, squares = {};
    float sum = 0, square = 0;
    for (int64_t c = 0; c < whole; c += n) sums += load(in + c);
    for (int64_t c = whole; c < a.channels; ++c) sum += in[c];
    const float mean = (sum_lanes<float>(sums) + sum) / static_cast<float>(a.channels);
    for (int64_t c = 0; c < whole; c += n) {
      const Vec<float> d = load(in + c) - mean;
      squares += d * d;
    }
    for (int64_t c = whole; c < a.channels; ++c) square += (in[c] - mean) * (in[c] - mean);
    const float variance = (sum_lanes<float>(squares) + square) / static_cast<float>(a.channels);
    const float factor = 1 / std::sqrt(variance + static_cast<float>(a.epsilon));
    for (int64_t c = 0; c < whole; c += n) {
      store(out + c, (load(in + c) - mean) * factor * load(a.gamma + c) + load(a.beta + c));
    }
    for (int64_t c = whole; c < a.channels; ++c) out[c] = (in[c] - mean) * factor * a.gamma[c] + a.beta[c];
  }
}

inline int64_t item_count(const Elementwise& a) { return a.rows; }

inline void run_items(const Elementwise& a, int64_t begin, int64_t end) {
  constexpr int64_t n = lanes<float>;
  const auto scale = static_cast<float>(a.scale);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t c = 0; c < a.channels; c += n) {
      const int64_t left = a.channels - c;
      Vec<float> v = scale * load_upto(a.in.row(row) + c, left);
      if (a.added.data != nullptr) v += load_upto(a.added.row(row) + c, left);
      store_upto(a.out.row(row) + c, activate<float>(v, a.activation), left);
    }
  }
}

inline int64_t item_count(const SparseProduct& a) { return a.batch * a.rows; }

inline void run_items(const SparseProduct& a, int64_t begin, int64_t end) {
  constexpr int64_t n = lanes<float>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.rows, m = row % a.rows;
    float* out = a.out.row(row);
    int64_t c = 0;
    for (; c + n <= a.channels; c += n) {
      Vec<float> sum = {};
      for (int64_t e = a.pointers[m]; e < a.pointers[m + 1]; ++e) {
        sum += a.values[e] * load(a.in.row(b * a.vertices + a.columns[e]) + c);
      }
      store(out + c, sum);
    }
    for (; c < a.channels; ++c) {
      float sum = 0;
      for (int64_t e = a.pointers[m]; e < a.pointers[m + 1]; ++e) {
        sum += a.values[e] * a.in.row(b * a.vertices + a.columns[e])[c];
      }
      out[c] = sum;
    }
  }
}

inline int64_t item_count(const SoftArgmax& a) {
  return a.batch * ((a.channels + lanes<float> - 1) / lanes<float>);
}

inline void run_items(const SoftArgmax& a, int64_t begin, int64_t end) {
  constexpr int64_t n = lanes<float>;
  const int64_t vectors = (a.channels + n - 1) / n;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / vectors, c = item % vectors * n, count = std::min(n, a.channels - c);
    const float* in = a.in.row(b * a.pixels) + c;
    Vec<float> most = load_upto(in, count);
    for (int64_t p = 1; p < a.pixels; ++p) {
      const Vec<float> v = load_upto(in + p * a.in.stride, count);
      most = most > v ? most : v;
    }
    Vec<float> sum = {}, x = {}, y = {};
    for (int64_t p = 0; p < a.pixels; ++p) {
      const Vec<float> mass = exponential(load_upto(in + p * a.in.stride, count) - most);
      sum += mass;
      x += a.places[p] * mass;
      y += a.places[a.pixels + p] * mass;
    }
    for (int64_t i = 0; i < count; ++i) {
      float* out = a.out.row(b * a.channels + c + i);
      out[0] = x[i] / sum[i];
      out[1] = y[i] / sum[i];
    }
  }
}

// ---- vertex_sample ----

inline int64_t item_count(const Sample& a) {
  return a.batch * a.map_count * ((a.vertices + vertex_block - 1) / vertex_block);
}

inline void run_items(const Sample& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.vertices + vertex_block - 1) / vertex_block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / (a.map_count * blocks), index = item / blocks % a.map_count;
    const int64_t first = item % blocks * vertex_block;
    const int64_t count = std::min<int64_t>(vertex_block, a.vertices - first);
    const SampledMap& map = a.maps[index];
    int64_t channel = 0;
    for (int64_t i = 0; i < index; ++i) channel += a.maps[i].channels;

    const float* camera = a.camera.data == nullptr ? nullptr : a.camera.row(b);
    float points[2 * vertex_block];
    for (int64_t n = 0; n < count; ++n) {
      const float* vertex = a.points.row(b * a.vertices + first + n);
      bool valid = true;
      for (int i = 0; i < 2; ++i) {
        points[2 * n + i] = camera == nullptr ? vertex[i] : camera[0] * (vertex[i] + camera[1 + i]);
        valid = valid && std::isfinite(points[2 * n + i]);
      }
      valid = valid && (camera == nullptr || std::isfinite(vertex[2]));
      if (!valid) points[2 * n] = points[2 * n + 1] = std::numeric_limits<float>::quiet_NaN();
    }

    SampleMap place{};
    place.height = map.height;
    place.width = map.width;
    place.first_channel = channel;
    SampleJob job{};
    job.channels = a.out.stride;
    job.points = points;
    job.zeros = a.zeros;
    job.output = a.out.row(b * a.vertices + first);
    job.align_corners = a.align_corners;
    job.border = a.border;
    const Source<float> source{map.in.row(b * map.height * map.width), map.width * map.in.stride,
                               map.in.stride, 1};
    sample_rows<float>(job, place, 0, 0, count, source, 0, map.channels);
  }
}

// Steps that need no working memory of a thread.
template <typename Step>
void run_items(const Step& a, int64_t begin, int64_t end, int) {
  run_items(a, begin, end);
}

template <typename Step>
void count_items(const Step& a, int64_t& items) {
  items = item_count(a);
}

}  // namespace pahm::PAHM_ISA
