// Bilinear sampling of one unit of work: some vertices or some channels of one map of one batch item.
// Compiled once per instruction set by foreach_isa.h; the structs are in vertex_sample.cpp.
#include "cpu/transpose.h"

namespace pahm::PAHM_ISA {

// The four pixels around a point, in the order (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1).
template <typename T>
struct Corners {
  int64_t x, y;
  T fx, fy;  // position inside the cell, in [0, 1)
  T dx, dy;  // pixels per unit of the normalised coordinate; 0 if the point was clamped
  T weight[4];
  bool inside[4];
  bool all_inside;

  int64_t offset(int k, int64_t row, int64_t column) const {
    return (y + (k >> 1)) * row + (x + (k & 1)) * column;
  }
};

// From a normalised coordinate to pixels. Clamps to the border, or returns false if no pixel is near.
template <typename T>
inline __attribute__((always_inline)) bool place(T normalised, int64_t size, const SampleJob& job,
                                                 T& position, T& slope) {
  const T extent = static_cast<T>(size);
  const T last = extent - 1;
  slope = (job.align_corners ? last : extent) / 2;
  position = job.align_corners ? (normalised + 1) / 2 * last : ((normalised + 1) * extent - 1) / 2;
  if (job.border) {
    if (!(position > 0)) {
      position = 0;
      slope = 0;
    } else if (!(position < last)) {
      position = last;
      slope = 0;
    }
    return true;
  }
  return position >= -1 && position < extent;
}

// False for a vertex that takes nothing from the map: invalid (NaN), or outside with zero padding.
template <typename T>
inline __attribute__((always_inline)) bool locate(const SampleJob& job, const SampleMap& map, int64_t vertex,
                                                  Corners<T>& c) {
  const T* point = static_cast<const T*>(job.points) + 2 * vertex;
  T x, y;
  if (point[0] != point[0] || !place(point[0], map.width, job, x, c.dx) ||
      !place(point[1], map.height, job, y, c.dy)) {
    return false;
  }
  const T x0 = std::floor(x), y0 = std::floor(y);
  // Beyond 2^24 floats skip pixels, and rounding may have moved a position past the map's end.
  c.x = std::min(static_cast<int64_t>(x0), map.width - 1);
  c.y = std::min(static_cast<int64_t>(y0), map.height - 1);
  c.fx = x - x0;
  c.fy = y - y0;
  c.weight[0] = (1 - c.fx) * (1 - c.fy);
  c.weight[1] = c.fx * (1 - c.fy);
  c.weight[2] = (1 - c.fx) * c.fy;
  c.weight[3] = c.fx * c.fy;
  const bool left = c.x >= 0, right = c.x + 1 < map.width, top = c.y >= 0, bottom = c.y + 1 < map.height;
  c.inside[0] = left && top;
  c.inside[1] = right && top;
  c.inside[2] = left && bottom;
  c.inside[3] = right && bottom;
  c.all_inside = left && right && top && bottom;
  return true;
}

// The gradient of a point, from the four products <output gradient, corner>.
template <typename T>
inline __attribute__((always_inline)) void point_gradient(const Corners<T>& c, const T* product,
                                                          T* gradient) {
  gradient[0] = c.dx * ((product[1] - product[0]) * (1 - c.fy) + (product[3] - product[2]) * c.fy);
  gradient[1] = c.dy * ((product[2] - product[0]) * (1 - c.fx) + (product[3] - product[1]) * c.fx);
}

// The sums of the lanes of four vectors, in a fixed order.
template <typename T>
inline __attribute__((always_inline)) void sum_lanes_of_four(const Vec<T>* v, T* sums) {
  for (int k = 0; k < 4; ++k) sums[k] = sum_lanes<T>(v[k]);
}

// A block of channels of one map of one batch item, as the loops over vertices read it.
template <typename D>
struct Source {
  const D* data;
  int64_t row, column, channel;
};

// Copies channels [begin, end) of planes to adjacent channels.
template <typename S>
Source<Compute<S>> side_by_side(const SampleMap& map, int64_t item, const SampleUnit& unit,
                                Compute<S>* scratch) {
  const int64_t channels = unit.end - unit.begin;
  const S* data = static_cast<const S*>(map.data) + item * map.batch + unit.begin * map.channel;
  if (map.column == 1 && (map.row == map.width || map.height == 1)) {
    transpose(data, map.channel, channels, map.height * map.width, scratch, channels);
  } else if (map.column == 1) {
    for (int64_t y = 0; y < map.height; ++y) {
      transpose(data + y * map.row, map.channel, channels, map.width, scratch + y * map.width * channels,
                channels);
    }
  } else {
    for (int64_t y = 0; y < map.height; ++y) {
      for (int64_t x = 0; x < map.width; ++x) {
        const S* pixel = data + y * map.row + x * map.column;
        Compute<S>* out = scratch + (y * map.width + x) * channels;
        for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<Compute<S>>(pixel[c * map.channel]);
      }
    }
  }
  return {scratch, map.width * channels, channels, 1};
}

// Adjacent channels: vertices [begin, end), channels [unit_begin, unit_begin + channels).
template <typename S, typename D>
void sample_rows(const SampleJob& job, const SampleMap& map, int64_t item, int64_t begin, int64_t end,
                 const Source<D>& source, int64_t first_channel, int64_t channels) {
  using T = Compute<S>;
  const D* zeros = static_cast<const D*>(job.zeros);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t vertex = item * job.vertices + n;
    S* out = static_cast<S*>(job.output) + vertex * job.channels + map.first_channel + first_channel;
    Corners<T> c;
    if (!locate(job, map, vertex, c)) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(channels) * sizeof(S));
      continue;
    }
    const D* p[4];
    for (int k = 0; k < 4; ++k)
      p[k] = c.inside[k] ? source.data + c.offset(k, source.row, source.column) : zeros;
    int64_t i = 0;
    for (; i + lanes<T> <= channels; i += lanes<T>) {
      store(out + i, c.weight[0] * load(p[0] + i) + c.weight[1] * load(p[1] + i) +
                         c.weight[2] * load(p[2] + i) + c.weight[3] * load(p[3] + i));
    }
    for (; i < channels; ++i) {
      out[i] = static_cast<S>(c.weight[0] * static_cast<T>(p[0][i]) + c.weight[1] * static_cast<T>(p[1][i]) +
                              c.weight[2] * static_cast<T>(p[2][i]) + c.weight[3] * static_cast<T>(p[3][i]));
    }
  }
}

// Channels a plane apart and few vertices: reads only the pixels that they touch.
template <typename S>
void sample_planes(const SampleJob& job, const SampleMap& map, int64_t item, const SampleUnit& unit) {
  using T = Compute<S>;
  const S* data = static_cast<const S*>(map.data) + item * map.batch + unit.begin * map.channel;
  const int64_t count = unit.end - unit.begin;
  for (int64_t n = 0; n < job.vertices; ++n) {
    const int64_t vertex = item * job.vertices + n;
    S* out = static_cast<S*>(job.output) + vertex * job.channels + map.first_channel + unit.begin;
    T sum[plane_block] = {};
    Corners<T> c;
    if (locate(job, map, vertex, c)) {
      for (int k = 0; k < 4; ++k) {
        if (!c.inside[k]) continue;
        const S* p = data + c.offset(k, map.row, map.column);
        for (int64_t j = 0; j < count; ++j) sum[j] += c.weight[k] * static_cast<T>(p[j * map.channel]);
      }
    }
    for (int64_t j = 0; j < count; ++j) out[j] = static_cast<S>(sum[j]);
  }
}

// Units [begin, end) among the units of all batch items, one item after another.
template <typename S>
void sample_units(const SampleJob& job, int64_t begin, int64_t end, Compute<S>* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / job.unit_count;
    const SampleUnit& unit = job.units[i % job.unit_count];
    const SampleMap& map = job.maps[unit.map];
    if (map.layout == Layout::rows) {
      const Source<S> source{static_cast<const S*>(map.data) + item * map.batch, map.row, map.column, 1};
      sample_rows<S>(job, map, item, unit.begin, unit.end, source, 0, map.channels);
    } else if (map.layout == Layout::dense_planes) {
      const auto source = side_by_side<S>(map, item, unit, scratch);
      sample_rows<S>(job, map, item, 0, job.vertices, source, unit.begin, unit.end - unit.begin);
    } else {
      sample_planes<S>(job, map, item, unit);
    }
  }
}

// Where the gradient of a block of channels is summed: in the gradient itself or in scratch.
template <typename T>
struct Target {
  T* data;
  int64_t row, column, channel;
};

// Adjacent channels: adds the block's products with the output gradient to map and points.
template <typename S, bool ToMap, bool ToPoints, typename D>
void backward_rows(const SampleJob& job, const SampleMap& map, int64_t item, const SampleUnit& unit,
                   const Source<D>& source, const Target<Compute<S>>& target, Compute<S>* point_grads) {
  using T = Compute<S>;
  const D* zeros = static_cast<const D*>(job.zeros);
  const int64_t channels = unit.end - unit.begin;
  T unused[row_block];
  if constexpr (ToMap) std::memset(unused, 0, sizeof unused);
  for (int64_t n = 0; n < job.vertices; ++n) {
    const int64_t vertex = item * job.vertices + n;
    Corners<T> c;
    if (!locate(job, map, vertex, c)) {
      if constexpr (ToPoints) point_grads[2 * n] = point_grads[2 * n + 1] = 0;
      continue;
    }
    const S* grad =
        static_cast<const S*>(job.output_grad) + vertex * job.channels + map.first_channel + unit.begin;
    const D* p[4];
    T* g[4];
    Vec<T> dot[4] = {};
    for (int k = 0; k < 4; ++k) {
      if constexpr (ToPoints)
        p[k] = c.inside[k] ? source.data + c.offset(k, source.row, source.column) : zeros;
      if constexpr (ToMap) g[k] = c.inside[k] ? target.data + c.offset(k, target.row, target.column) : unused;
    }
    int64_t i = 0;
    for (; i + lanes<T> <= channels; i += lanes<T>) {
      const Vec<T> v = load(grad + i);
      for (int k = 0; k < 4; ++k) {
        if constexpr (ToMap) store(g[k] + i, load(g[k] + i) + c.weight[k] * v);
        if constexpr (ToPoints) dot[k] += v * load(p[k] + i);
      }
    }
    T product[4] = {};
    if constexpr (ToPoints) sum_lanes_of_four<T>(dot, product);
    for (; i < channels; ++i) {
      const T v = static_cast<T>(grad[i]);
      for (int k = 0; k < 4; ++k) {
        if constexpr (ToMap) g[k][i] += c.weight[k] * v;
        if constexpr (ToPoints) product[k] += v * static_cast<T>(p[k][i]);
      }
    }
    if constexpr (ToPoints) point_gradient(c, product, point_grads + 2 * n);
  }
}

// Channels a plane apart and few vertices.
template <typename S, bool ToMap, bool ToPoints>
void backward_planes(const SampleJob& job, const SampleMap& map, int64_t item, const SampleUnit& unit,
                     const Source<S>& source, const Target<Compute<S>>& target, Compute<S>* point_grads) {
  using T = Compute<S>;
  const int64_t count = unit.end - unit.begin;
  for (int64_t n = 0; n < job.vertices; ++n) {
    const int64_t vertex = item * job.vertices + n;
    Corners<T> c;
    if (!locate(job, map, vertex, c)) {
      if constexpr (ToPoints) point_grads[2 * n] = point_grads[2 * n + 1] = 0;
      continue;
    }
    const S* grad =
        static_cast<const S*>(job.output_grad) + vertex * job.channels + map.first_channel + unit.begin;
    T product[4] = {};
    for (int k = 0; k < 4; ++k) {
      if (!c.inside[k]) continue;
      const S* p = source.data + c.offset(k, source.row, source.column);
      T* g = nullptr;
      if constexpr (ToMap) g = target.data + c.offset(k, target.row, target.column);
      for (int64_t j = 0; j < count; ++j) {
        const T v = static_cast<T>(grad[j]);
        if constexpr (ToMap) g[j * target.channel] += c.weight[k] * v;
        if constexpr (ToPoints) product[k] += v * static_cast<T>(p[j * source.channel]);
      }
    }
    if constexpr (ToPoints) point_gradient(c, product, point_grads + 2 * n);
  }
}

// Copies `count` sums into the gradient, in the gradient's dtype.
template <typename S, typename T>
void round_to(S* out, const T* sums, int64_t count) {
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store(out + i, load(sums + i));
  for (; i < count; ++i) out[i] = static_cast<S>(sums[i]);
}

// One block of channels of one map of one batch item: its map gradient (ToMap), its share of the point
// gradients (ToPoints).
template <typename S, bool ToMap, bool ToPoints>
void backward_unit(const SampleJob& job, int64_t item, int64_t index, Compute<S>* scratch) {
  using T = Compute<S>;
  const SampleUnit& unit = job.units[index];
  const SampleMap& map = job.maps[unit.map];
  T* point_grads = nullptr;
  if constexpr (ToPoints) {
    point_grads = static_cast<T*>(job.point_grads) + (item * job.unit_count + index) * job.vertices * 2;
  }
  const int64_t channels = unit.end - unit.begin, pixels = map.height * map.width;
  const bool rows = map.layout == Layout::rows, whole = !rows || channels == map.channels;
  const bool direct = std::is_same_v<S, T> && map.layout != Layout::dense_planes;
  S* grad = static_cast<S*>(map.grad) + item * map.channels * pixels + unit.begin * (rows ? 1 : pixels);
  Target<T> target{};
  if constexpr (ToMap) {
    const int64_t column = map.layout == Layout::planes ? 1 : direct ? map.channels : channels;
    target = {scratch, map.width * column, column, map.layout == Layout::planes ? pixels : 1};
    if constexpr (std::is_same_v<S, T>) {
      if (direct) target.data = grad;
    }
    const bool one_run = !direct || whole;
    const int64_t runs = one_run ? 1 : pixels, run = one_run ? pixels * channels : channels;
    for (int64_t i = 0; i < runs; ++i) {
      std::memset(target.data + i * map.channels, 0, static_cast<size_t>(run) * sizeof(T));
    }
  }
  const S* data = static_cast<const S*>(map.data) + item * map.batch + unit.begin * map.channel;
  if (map.layout == Layout::dense_planes) {
    Source<T> source{};
    if constexpr (ToPoints) source = side_by_side<S>(map, item, unit, scratch + pixels * channels);
    backward_rows<S, ToMap, ToPoints>(job, map, item, unit, source, target, point_grads);
    if constexpr (ToMap) transpose(scratch, channels, pixels, channels, grad, pixels);
    return;
  }
  const Source<S> source{data, map.row, map.column, map.channel};
  if (rows) {
    backward_rows<S, ToMap, ToPoints>(job, map, item, unit, source, target, point_grads);
  } else {
    backward_planes<S, ToMap, ToPoints>(job, map, item, unit, source, target, point_grads);
  }
  if (ToMap && !direct) {
    const int64_t runs = whole ? 1 : pixels, run = whole ? pixels * channels : channels;
    for (int64_t i = 0; i < runs; ++i) round_to(grad + i * map.channels, scratch + i * channels, run);
  }
}

template <typename S>
void backward_units(const SampleJob& job, int64_t begin, int64_t end, Compute<S>* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / job.unit_count, index = i % job.unit_count;
    if (job.maps[job.units[index].map].grad == nullptr) {
      if (job.point_grads != nullptr) backward_unit<S, false, true>(job, item, index, scratch);
    } else if (job.point_grads == nullptr) {
      backward_unit<S, true, false>(job, item, index, scratch);
    } else {
      backward_unit<S, true, true>(job, item, index, scratch);
    }
  }
}

}  // namespace pahm::PAHM_ISA
