// The kernels of depthwise_conv.cpp. Compiled once per instruction set (cpu/foreach_isa.h): no include, no
// guard.
namespace pahm::PAHM_ISA {

// Channels that stay in the cache while a row of pixels is made.
inline constexpr int64_t depthwise_block = 64;

// P neighbouring results of V vectors of channels: the taps [ky0, ky1) x [kx0, kx1), all inside the input.
// `in` is the input below tap (0, 0) of the first result, `count` the channels of the last vector.
template <int P, int V>
inline __attribute__((always_inline)) void depthwise_results(const DepthwiseConv& a, const float* in,
                                                             const float* weight, int64_t ky0, int64_t ky1,
                                                             int64_t kx0, int64_t kx1, float* out,
                                                             int64_t count) {
  constexpr int n = lanes<float>;
  Vec<float> sums[P][V] = {};
  const bool whole = count == n;
  for (int64_t ky = ky0; ky < ky1; ++ky) {
    for (int64_t kx = kx0; kx < kx1; ++kx) {
      const float* w = weight + (ky * a.kernel_width + kx) * a.channels;
      const float* x = in + (ky * a.width + kx) * a.channels;
      for (int v = 0; v < V; ++v) {
        const Vec<float> factor = whole ? load(w + v * n) : load_first(w, count);
        for (int p = 0; p < P; ++p) {
          const float* value = x + p * a.stride * a.channels + v * n;
          sums[p][v] += factor * (whole ? load(value) : load_first(value, count));
        }
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < V; ++v) {
      float* to = out + p * a.channels + v * n;
      whole ? store(to, sums[p][v]) : store_first(to, sums[p][v], count);
    }
  }
}

template <int P>
inline __attribute__((always_inline)) void depthwise_channels(const DepthwiseConv& a, const float* in,
                                                              int64_t first, int64_t last, int64_t ky0,
                                                              int64_t ky1, int64_t kx0, int64_t kx1,
                                                              float* out) {
  constexpr int n = lanes<float>, wide = P == 1 ? 4 : 2;
  int64_t c = first;
  for (; c + wide * n <= last; c += wide * n) {
    depthwise_results<P, wide>(a, in + c, a.weight + c, ky0, ky1, kx0, kx1, out + c, n);
  }
  for (; c + n <= last; c += n) {
    depthwise_results<P, 1>(a, in + c, a.weight + c, ky0, ky1, kx0, kx1, out + c, n);
  }
  if (c < last) depthwise_results<P, 1>(a, in + c, a.weight + c, ky0, ky1, kx0, kx1, out + c, last - c);
}

// Rows [begin, end) of the batch's results.
inline void depthwise_rows(const DepthwiseConv& a, int64_t begin, int64_t end) {
  constexpr int pixels = 4;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t item = row / a.out_height, y = row % a.out_height * a.stride - a.top;
    const int64_t ky0 = std::max<int64_t>(0, -y), ky1 = std::min(a.kernel_height, a.height - y);
    const float* in = a.in + (item * a.height + y) * a.width * a.channels;
    for (int64_t first = 0; first < a.channels; first += depthwise_block) {
      const int64_t last = std::min(a.channels, first + depthwise_block);
      for (int64_t ox = 0; ox < a.out_width;) {
        const int64_t x = ox * a.stride - a.left;
        const float* corner = in + x * a.channels;
        float* out = a.out + (row * a.out_width + ox) * a.channels;
        const int64_t end_x = x + (pixels - 1) * a.stride + a.kernel_width;
        if (x >= 0 && end_x <= a.width && ox + pixels <= a.out_width) {
          depthwise_channels<pixels>(a, corner, first, last, ky0, ky1, 0, a.kernel_width, out);
          ox += pixels;
        } else {
          const int64_t kx0 = std::max<int64_t>(0, -x), kx1 = std::min(a.kernel_width, a.width - x);
          depthwise_channels<1>(a, corner, first, last, ky0, ky1, kx0, kx1, out);
          ++ox;
        }
      }
    }
  }
}

// V vectors of the gradient to one input pixel (iy, ix) of an item, whose gradient of results is `grad`.
template <int V>
inline __attribute__((always_inline)) void depthwise_pixel_grad(const DepthwiseConv& a, const float* grad,
                                                                int64_t c, int64_t iy, int64_t ix, float* out,
                                                                int64_t count) {
  constexpr int n = lanes<float>;
  Vec<float> sums[V] = {};
  const bool whole = count == n;
  for (int64_t ky = (iy + a.top) % a.stride; ky < a.kernel_height; ky += a.stride) {
    const int64_t oy = (iy + a.top - ky) / a.stride;
    if (iy + a.top < ky || oy >= a.out_height) continue;
    for (int64_t kx = (ix + a.left) % a.stride; kx < a.kernel_width; kx += a.stride) {
      const int64_t ox = (ix + a.left - kx) / a.stride;
      if (ix + a.left < kx || ox >= a.out_width) continue;
      const float* w = a.weight + (ky * a.kernel_width + kx) * a.channels + c;
      const float* g = grad + (oy * a.out_width + ox) * a.channels + c;
      for (int v = 0; v < V; ++v) {
        sums[v] += whole ? load(w + v * n) * load(g + v * n) : load_first(w, count) * load_first(g, count);
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    whole ? store(out + c + v * n, sums[v]) : store_first(out + c, sums[v], count);
  }
}

// Rows [begin, end) of the batch's input gradient, for any stride. Here `in` holds the results' gradient.
inline void depthwise_grad_rows(const DepthwiseConv& a, int64_t begin, int64_t end) {
  constexpr int n = lanes<float>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t item = row / a.height, iy = row % a.height;
    const float* grad = a.in + item * a.out_height * a.out_width * a.channels;
    for (int64_t ix = 0; ix < a.width; ++ix) {
      float* out = a.out + (row * a.width + ix) * a.channels;
      int64_t c = 0;
      for (; c + 4 * n <= a.channels; c += 4 * n) depthwise_pixel_grad<4>(a, grad, c, iy, ix, out, n);
      for (; c + n <= a.channels; c += n) depthwise_pixel_grad<1>(a, grad, c, iy, ix, out, n);
      if (c < a.channels) depthwise_pixel_grad<1>(a, grad, c, iy, ix, out, a.channels - c);
    }
  }
}

// Adds to K neighbouring taps of V vectors of channels what the results [ox0, ox1) of a row give. `in` is the
// input below the first tap of result 0.
template <int K, int V>
inline __attribute__((always_inline)) void depthwise_tap_sums(const DepthwiseConv& a, const float* grad,
                                                              const float* in, int64_t ox0, int64_t ox1,
                                                              float* sums, int64_t count) {
  constexpr int n = lanes<float>;
  const bool whole = count == n;
  Vec<float> s[K][V];
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < V; ++v) {
      const float* from = sums + k * a.channels + v * n;
      s[k][v] = whole ? load(from) : load_first(from, count);
    }
  }
  for (int64_t ox = ox0; ox < ox1; ++ox) {
    for (int v = 0; v < V; ++v) {
      const float* g = grad + ox * a.channels + v * n;
      const Vec<float> factor = whole ? load(g) : load_first(g, count);
      for (int k = 0; k < K; ++k) {
        const float* x = in + (ox * a.stride + k) * a.channels + v * n;
        s[k][v] += factor * (whole ? load(x) : load_first(x, count));
      }
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < V; ++v) {
      float* to = sums + k * a.channels + v * n;
      whole ? store(to, s[k][v]) : store_first(to, s[k][v], count);
    }
  }
}

template <int K>
inline __attribute__((always_inline)) void depthwise_taps(const DepthwiseConv& a, const float* grad,
                                                          const float* in, int64_t ox0, int64_t ox1,
                                                          int64_t first, int64_t last, float* sums) {
  constexpr int n = lanes<float>;
  if (ox0 >= ox1) return;
  int64_t c = first;
  for (; c + 2 * n <= last; c += 2 * n) depthwise_tap_sums<K, 2>(a, grad + c, in + c, ox0, ox1, sums + c, n);
  for (; c + n <= last; c += n) depthwise_tap_sums<K, 1>(a, grad + c, in + c, ox0, ox1, sums + c, n);
  if (c < last) depthwise_tap_sums<K, 1>(a, grad + c, in + c, ox0, ox1, sums + c, last - c);
}

// The weight's gradient, (kernel_height * kernel_width, channels) in `out`, for the blocks [begin, end) of
// channels. `grad` is the results' gradient.
inline void depthwise_weight_grad(const DepthwiseConv& a, const float* grad, int64_t begin, int64_t end) {
  const int64_t first = begin * depthwise_block, last = std::min(a.channels, end * depthwise_block);
  for (int64_t k = 0; k < a.kernel_height * a.kernel_width; ++k) {
    std::fill(a.out + k * a.channels + first, a.out + k * a.channels + last, 0.0f);
  }
  const auto first_result = [&](int64_t kx) {  // the first result whose tap kx is inside the input
    return std::min(a.out_width, std::max<int64_t>(0, a.left - kx + a.stride - 1) / a.stride);
  };
  const auto last_result = [&](int64_t kx) {
    const int64_t room = a.width + a.left - kx;
    return room <= 0 ? 0 : std::min(a.out_width, (room + a.stride - 1) / a.stride);
  };
  // All taps are inside for the results [inner0, inner1).
  const int64_t kernel = a.kernel_width;
  const bool unrolled = kernel == 3 || kernel == 5;
  const int64_t inner0 = first_result(0), inner1 = unrolled ? last_result(kernel - 1) : 0;
  const bool has_inner = inner0 < inner1;
  for (int64_t row = 0; row < a.batch * a.out_height; ++row) {
    const int64_t item = row / a.out_height, y = row % a.out_height * a.stride - a.top;
    const float* g = grad + row * a.out_width * a.channels;
    for (int64_t ky = std::max<int64_t>(0, -y); ky < std::min(a.kernel_height, a.height - y); ++ky) {
      const float* in = a.in + ((item * a.height + y + ky) * a.width - a.left) * a.channels;
      float* sums = a.out + ky * kernel * a.channels;
      if (has_inner && kernel == 3) depthwise_taps<3>(a, g, in, inner0, inner1, first, last, sums);
      if (has_inner && kernel == 5) depthwise_taps<5>(a, g, in, inner0, inner1, first, last, sums);
      for (int64_t kx = 0; kx < kernel; ++kx) {
        const int64_t from = first_result(kx), to = last_result(kx);
        const float* x = in + kx * a.channels;
        float* s = sums + kx * a.channels;
        depthwise_taps<1>(a, g, x, from, has_inner ? std::min(to, inner0) : to, first, last, s);
        if (has_inner) depthwise_taps<1>(a, g, x, std::max(from, inner1), to, first, last, s);
      }
    }
  }
}

}  // namespace pahm::PAHM_ISA
