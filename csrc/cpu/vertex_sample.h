// Bilinear sampling of one unit of work: some vertices or some channels of one map of one batch item.
// Compiled once an instruction set by foreach_isa.h; the structs are in vertex_sample.cpp.
namespace pahm::PAHM_ISA {

// The four pixels around a point, in the order (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1).
template <typename T>
struct Corners {
  int64_t x, y;
  T fx, fy;  // position inside the cell, in [0, 1)
  T dx, dy;  // pixels per unit of the normalised coordinate; 0 where the point was clamped
  T weight[4];
  bool inside[4];
  bool all_inside;

  int64_t offset(int k, int64_t row, int64_t column) const {
    return (y + (k >> 1)) * row + (x + (k & 1)) * column;
  }
};

// From a normalised coordinate to pixels. Clamps to the border, or returns false where no pixel is near.
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

// False for a vertex that takes nothing from the map: not valid (NaN), or outside with zero padding.
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
  c.x = static_cast<int64_t>(x0);
  c.y = static_cast<int64_t>(y0);
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

// Channels side by side (channels_last): vertices [begin, end), every channel.
template <typename S>
void sample_rows(const SampleJob& job, const SampleMap& map, int64_t item, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const S* data = static_cast<const S*>(map.data) + item * map.batch;
  const S* zeros = static_cast<const S*>(job.zeros);
  const int64_t channels = map.channels;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t vertex = item * job.vertices + n;
    S* out = static_cast<S*>(job.output) + vertex * job.channels + map.first_channel;
    Corners<T> c;
    if (!locate(job, map, vertex, c)) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(channels) * sizeof(S));
      continue;
    }
    const S* p[4];
    for (int k = 0; k < 4; ++k) p[k] = c.inside[k] ? data + c.offset(k, map.row, map.column) : zeros;
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

// Channels a plane apart: channels [begin, end), at most plane_block of them, every vertex.
template <typename S>
void sample_planes(const SampleJob& job, const SampleMap& map, int64_t item, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const S* data = static_cast<const S*>(map.data) + item * map.batch + begin * map.channel;
  const int count = static_cast<int>(end - begin);
  for (int64_t n = 0; n < job.vertices; ++n) {
    const int64_t vertex = item * job.vertices + n;
    S* out = static_cast<S*>(job.output) + vertex * job.channels + map.first_channel + begin;
    Corners<T> c;
    if (!locate(job, map, vertex, c)) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(count) * sizeof(S));
      continue;
    }
    if (c.all_inside) {
      const S* top = data + c.offset(0, map.row, map.column);
      const S* bottom = top + map.row;
      for (int j = 0; j < count; ++j, top += map.channel, bottom += map.channel) {
        out[j] = static_cast<S>(
            c.weight[0] * static_cast<T>(top[0]) + c.weight[1] * static_cast<T>(top[map.column]) +
            c.weight[2] * static_cast<T>(bottom[0]) + c.weight[3] * static_cast<T>(bottom[map.column]));
      }
      continue;
    }
    T sum[plane_block] = {};
    for (int k = 0; k < 4; ++k) {
      if (!c.inside[k]) continue;
      const S* p = data + c.offset(k, map.row, map.column);
      for (int j = 0; j < count; ++j) sum[j] += c.weight[k] * static_cast<T>(p[j * map.channel]);
    }
    for (int j = 0; j < count; ++j) out[j] = static_cast<S>(sum[j]);
  }
}

// Units [begin, end) of all batch items' units, one item after the other.
template <typename S>
void sample_units(const SampleJob& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / job.unit_count;
    const SampleUnit& unit = job.units[i % job.unit_count];
    const SampleMap& map = job.maps[unit.map];
    if (map.rows) {
      sample_rows<S>(job, map, item, unit.begin, unit.end);
    } else {
      sample_planes<S>(job, map, item, unit.begin, unit.end);
    }
  }
}

// Where the gradient of a block of channels is summed: the gradient itself, or scratch in a wider type.
template <typename T>
struct Target {
  T* data;
  int64_t row, column, channel;
};

// Channels side by side: adds the block's products with the output gradient to map and points.
template <typename S, bool ToMap, bool ToPoints>
void backward_rows(const SampleJob& job, const SampleMap& map, int64_t item, const SampleUnit& unit,
                   const Target<Compute<S>>& target, Compute<S>* point_grads) {
  using T = Compute<S>;
  const S* data = static_cast<const S*>(map.data) + item * map.batch + unit.begin;
  const S* zeros = static_cast<const S*>(job.zeros);
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
    const S* p[4];
    T* g[4];
    Vec<T> dot[4] = {};
    for (int k = 0; k < 4; ++k) {
      if constexpr (ToPoints) p[k] = c.inside[k] ? data + c.offset(k, map.row, map.column) : zeros;
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
    T product[4];
    for (int k = 0; k < 4; ++k) product[k] = sum_lanes<T>(dot[k]);
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

// Channels a plane apart.
template <typename S, bool ToMap, bool ToPoints>
void backward_planes(const SampleJob& job, const SampleMap& map, int64_t item, const SampleUnit& unit,
                     const Target<Compute<S>>& target, Compute<S>* point_grads) {
  using T = Compute<S>;
  const S* data = static_cast<const S*>(map.data) + item * map.batch + unit.begin * map.channel;
  const int count = static_cast<int>(unit.end - unit.begin);
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
      const S* p = data + c.offset(k, map.row, map.column);
      T* g = nullptr;
      if constexpr (ToMap) g = target.data + c.offset(k, target.row, target.column);
      for (int j = 0; j < count; ++j) {
        const T v = static_cast<T>(grad[j]);
        if constexpr (ToMap) g[j * target.channel] += c.weight[k] * v;
        if constexpr (ToPoints) product[k] += v * static_cast<T>(p[j * map.channel]);
      }
    }
    if constexpr (ToPoints) point_gradient(c, product, point_grads + 2 * n);
  }
}

template <typename S, bool ToMap, bool ToPoints>
void backward_block(const SampleJob& job, const SampleMap& map, int64_t item, const SampleUnit& unit,
                    const Target<Compute<S>>& target, Compute<S>* point_grads) {
  if (map.rows) {
    backward_rows<S, ToMap, ToPoints>(job, map, item, unit, target, point_grads);
  } else {
    backward_planes<S, ToMap, ToPoints>(job, map, item, unit, target, point_grads);
  }
}

// Copies `count` sums into the gradient, in its own dtype.
template <typename S, typename T>
void round_to(S* out, const T* sums, int64_t count) {
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store(out + i, load(sums + i));
  for (; i < count; ++i) out[i] = static_cast<S>(sums[i]);
}

// One block of channels of one map of one batch item: its map gradient, and its share of the point gradients.
// `scratch` holds height * width * block sums where the map's dtype is not the one that sums are kept in.
template <typename S>
void backward_unit(const SampleJob& job, int64_t item, int64_t index, Compute<S>* scratch) {
  using T = Compute<S>;
  const SampleUnit& unit = job.units[index];
  const SampleMap& map = job.maps[unit.map];
  T* point_grads = job.point_grads == nullptr ? nullptr
                                              : static_cast<T*>(job.point_grads) +
                                                    (item * job.unit_count + index) * job.vertices * 2;
  if (map.grad == nullptr) {
    backward_block<S, false, true>(job, map, item, unit, {}, point_grads);
    return;
  }
  const int64_t channels = unit.end - unit.begin, pixels = map.height * map.width;
  const bool whole = !map.rows || channels == map.channels;  // the block is one run of memory
  S* grad = static_cast<S*>(map.grad) + item * map.channels * pixels + unit.begin * (map.rows ? 1 : pixels);
  Target<T> target;
  constexpr bool direct = std::is_same_v<S, T>;
  if constexpr (direct) {
    target.data = grad;
    if (whole) {
      std::memset(grad, 0, static_cast<size_t>(pixels * channels) * sizeof(T));
    } else {
      for (int64_t i = 0; i < pixels; ++i) {
        std::memset(grad + i * map.channels, 0, static_cast<size_t>(channels) * sizeof(T));
      }
    }
  } else {
    target.data = scratch;
    std::memset(scratch, 0, static_cast<size_t>(pixels * channels) * sizeof(T));
  }
  target.channel = map.rows ? 1 : pixels;
  target.column = !map.rows ? 1 : direct ? map.channels : channels;
  target.row = map.width * target.column;
  if (point_grads == nullptr) {
    backward_block<S, true, false>(job, map, item, unit, target, nullptr);
  } else {
    backward_block<S, true, true>(job, map, item, unit, target, point_grads);
  }
  if constexpr (!direct) {
    if (whole) {
      round_to(grad, scratch, pixels * channels);
    } else {
      for (int64_t i = 0; i < pixels; ++i)
        round_to(grad + i * map.channels, scratch + i * channels, channels);
    }
  }
}

template <typename S>
void backward_units(const SampleJob& job, int64_t begin, int64_t end, Compute<S>* scratch) {
  for (int64_t i = begin; i < end; ++i)
    backward_unit<S>(job, i / job.unit_count, i % job.unit_count, scratch);
}

}  // namespace pahm::PAHM_ISA
