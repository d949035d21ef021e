// The kernels of batch_norm.cpp. Compiled once per instruction set (cpu/foreach_isa.h): no include, no guard.
namespace pahm::PAHM_ISA {

// V vectors of channels in rows [begin, end): their means and their sums of squared distances from them.
template <int V>
inline __attribute__((always_inline)) void moments_of_rows(const float* x, int64_t channels, int64_t begin,
                                                           int64_t end, float* means, float* squares,
                                                           int64_t count) {
  constexpr int n = lanes<float>;
  const bool whole = count == n;
  const auto at = [&](int64_t row, int v) __attribute__((always_inline)) {
    const float* from = x + row * channels + v * n;
    return whole ? load(from) : load_first(from, count);
  };
  Vec<float> sums[V] = {}, distances[V] = {};
  for (int64_t row = begin; row < end; ++row) {
    for (int v = 0; v < V; ++v) sums[v] += at(row, v);
  }
  const Vec<float> share = broadcast(1.0f / static_cast<float>(end - begin));
  for (int v = 0; v < V; ++v) sums[v] *= share;
  for (int64_t row = begin; row < end; ++row) {
    for (int v = 0; v < V; ++v) {
      const Vec<float> distance = at(row, v) - sums[v];
      distances[v] += distance * distance;
    }
  }
  for (int v = 0; v < V; ++v) {
    whole ? store(means + v * n, sums[v]) : store_first(means, sums[v], count);
    whole ? store(squares + v * n, distances[v]) : store_first(squares, distances[v], count);
  }
}

// The moments of the groups [begin, end) of rows.
inline void batch_norm_moments(const BatchNorm& a, float* means, float* squares, int64_t begin, int64_t end) {
  constexpr int n = lanes<float>;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * a.group, last = std::min(a.rows, first + a.group);
    float *m = means + group * a.channels, *s = squares + group * a.channels;
    int64_t c = 0;
    for (; c + 4 * n <= a.channels; c += 4 * n) {
      moments_of_rows<4>(a.x + c, a.channels, first, last, m + c, s + c, n);
    }
    for (; c + n <= a.channels; c += n) moments_of_rows<1>(a.x + c, a.channels, first, last, m + c, s + c, n);
    if (c < a.channels) {
      moments_of_rows<1>(a.x + c, a.channels, first, last, m + c, s + c, a.channels - c);
    }
  }
}

// Selects by a comparison, so that a NaN stays a NaN.
inline __attribute__((always_inline)) Vec<float> clamped(Vec<float> v, Vec<float> low, Vec<float> high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// out = clamp(scale * x + shift) of rows [begin, end).
inline void batch_norm_rows(const BatchNorm& a, float* out, int64_t begin, int64_t end) {
  constexpr int n = lanes<float>;
  const Vec<float> low = broadcast(a.low), high = broadcast(a.high);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + row * a.channels;
    float* y = out + row * a.channels;
    int64_t c = 0;
    for (; c + n <= a.channels; c += n) {
      store(y + c, clamped(load(x + c) * load(a.scale + c) + load(a.shift + c), low, high));
    }
    if (const int64_t count = a.channels - c; count > 0) {
      const Vec<float> v = load_first(x + c, count) * load_first(a.scale + c, count);
      store_first(y + c, clamped(v + load_first(a.shift + c, count), low, high), count);
    }
  }
}

// The gradient before the clamp: zero where the clamp was at a limit.
inline __attribute__((always_inline)) Vec<float> passed(Vec<float> grad, Vec<float> v, Vec<float> low,
                                                        Vec<float> high) {
  grad = v <= low ? Vec<float>{} : grad;
  return v >= high ? Vec<float>{} : grad;
}

template <int V>
inline __attribute__((always_inline)) void grad_sums_of_rows(const BatchNorm& a, const float* grad, int64_t c,
                                                             int64_t begin, int64_t end, float* sums,
                                                             float* products, int64_t count) {
  constexpr int n = lanes<float>;
  const bool whole = count == n;
  const auto at = [&](const float* from)
                      __attribute__((always_inline)) { return whole ? load(from) : load_first(from, count); };
  const Vec<float> low = broadcast(a.low), high = broadcast(a.high);
  Vec<float> sum[V] = {}, product[V] = {}, scale[V], shift[V], mean[V];
  for (int v = 0; v < V; ++v) {
    scale[v] = at(a.scale + c + v * n);
    shift[v] = at(a.shift + c + v * n);
    mean[v] = at(a.mean + c + v * n);
  }
  for (int64_t row = begin; row < end; ++row) {
    for (int v = 0; v < V; ++v) {
      const int64_t place = row * a.channels + c + v * n;
      const Vec<float> x = at(a.x + place);
      const Vec<float> g = passed(at(grad + place), x * scale[v] + shift[v], low, high);
      sum[v] += g;
      product[v] += g * (x - mean[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    whole ? store(sums + c + v * n, sum[v]) : store_first(sums + c, sum[v], count);
    whole ? store(products + c + v * n, product[v]) : store_first(products + c, product[v], count);
  }
}

// For the groups [begin, end) of rows: the sums of the gradient, and of its products with x - mean.
inline void batch_norm_grad_sums(const BatchNorm& a, const float* grad, float* sums, float* products,
                                 int64_t begin, int64_t end) {
  constexpr int n = lanes<float>;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * a.group, last = std::min(a.rows, first + a.group);
    float *s = sums + group * a.channels, *p = products + group * a.channels;
    int64_t c = 0;
    for (; c + 2 * n <= a.channels; c += 2 * n) grad_sums_of_rows<2>(a, grad, c, first, last, s, p, n);
    for (; c + n <= a.channels; c += n) grad_sums_of_rows<1>(a, grad, c, first, last, s, p, n);
    if (c < a.channels) grad_sums_of_rows<1>(a, grad, c, first, last, s, p, a.channels - c);
  }
}

// out = scale * (gradient before the clamp) + slope * x + offset of rows [begin, end).
inline void batch_norm_grad_rows(const BatchNorm& a, const float* grad, const float* slope,
                                 const float* offset, float* out, int64_t begin, int64_t end) {
  constexpr int n = lanes<float>;
  const Vec<float> low = broadcast(a.low), high = broadcast(a.high);
  for (int64_t row = begin; row < end; ++row) {
    const float *x = a.x + row * a.channels, *g = grad + row * a.channels;
    float* to = out + row * a.channels;
    int64_t c = 0;
    for (; c + n <= a.channels; c += n) {
      const Vec<float> value = load(x + c), scale = load(a.scale + c);
      const Vec<float> inner = passed(load(g + c), value * scale + load(a.shift + c), low, high);
      store(to + c, scale * inner + load(slope + c) * value + load(offset + c));
    }
    if (const int64_t count = a.channels - c; count > 0) {
      const Vec<float> value = load_first(x + c, count), scale = load_first(a.scale + c, count);
      const Vec<float> before = value * scale + load_first(a.shift + c, count);
      const Vec<float> inner = passed(load_first(g + c, count), before, low, high);
      const Vec<float> rest = load_first(slope + c, count) * value + load_first(offset + c, count);
      store_first(to + c, scale * inner + rest, count);
    }
  }
}

}  // namespace pahm::PAHM_ISA
