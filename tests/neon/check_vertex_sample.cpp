#include "check.h"

#include "cpu/vertex_sample.cpp"

namespace {

template <typename S>
using ComputeType = std::conditional_t<std::is_same_v<S, double>, double, float>;

// A map with channels side by side or in planes; all of its points inside.
template <typename S>
void check_vertex_sample(int64_t batch, int64_t count, int64_t channels, int64_t size, bool planes) {
  using T = ComputeType<S>;
  const auto map = random_numbers<S>(batch * channels * size * size);
  const auto grad = random_numbers<S>(batch * count * channels);
  const auto points = random_numbers<T>(batch * count * 2, -0.8, 0.8);
  const int64_t channel = planes ? size * size : 1, column = planes ? 1 : channels;
  std::vector<S> out(static_cast<size_t>(batch * count * channels)), map_grad(map.size());
  std::vector<T> point_grads(points.size());
  std::vector<double> wanted(out.size()), wanted_map(map.size()), wanted_points(points.size());
  for (int64_t v = 0; v < batch * count; ++v) {
    const double x = ((points[2 * v] + 1.0) * size - 1) / 2, y = ((points[2 * v + 1] + 1.0) * size - 1) / 2;
    const auto left = static_cast<int64_t>(std::floor(x)), top = static_cast<int64_t>(std::floor(y));
    const double fx = x - left, fy = y - top, half = size / 2.0;
    for (int64_t c = 0; c < channels; ++c) {
      for (int k = 0; k < 4; ++k) {
        const double wx = k % 2 ? fx : 1 - fx, wy = k / 2 ? fy : 1 - fy;
        const int64_t pixel = (top + k / 2) * size + left + k % 2;
        const int64_t i = v / count * channels * size * size + pixel * column + c * channel;
        const double g = static_cast<double>(grad[v * channels + c]), value = static_cast<double>(map[i]);
        wanted[v * channels + c] += wx * wy * value;
        wanted_map[i] += wx * wy * g;
        wanted_points[2 * v] += half * (k % 2 ? wy : -wy) * value * g;
        wanted_points[2 * v + 1] += half * (k / 2 ? wx : -wx) * value * g;
      }
    }
  }
  const pahm::SampleMap maps[1] = {{map.data(), map_grad.data(), channels, size, size, 0,
                                    channels * size * size, channel, size * column, column,
                                    planes ? pahm::Layout::dense_planes : pahm::Layout::rows}};
  const std::vector<double> zeros(static_cast<size_t>(channels));
  pahm::SampleUnit unit{0, 0, planes ? channels : count};
  pahm::SampleJob job{};
  job.maps = maps;
  job.units = &unit;
  job.unit_count = 1;
  job.vertices = count;
  job.channels = channels;
  job.points = points.data();
  job.zeros = zeros.data();
  job.output = out.data();
  job.output_grad = grad.data();
  job.point_grads = point_grads.data();
  const pahm::Scratch<T> scratch(2 * channels * size * size);
  pahm::isa_baseline::sample_units<S>(job, 0, batch, scratch.get());
  unit.end = channels;
  pahm::isa_baseline::backward_units<S>(job, 0, batch, scratch.get());
  check_close(planes ? "vertex_sample in planes" : "vertex_sample in rows", out, wanted);
  check_close("its map gradient", map_grad, wanted_map);
  if (sizeof(S) > 2) check_close("its point gradient", point_grads, wanted_points);
}

}  // namespace

int main() {
  return run([](auto zero) {
    using S = decltype(zero);
    check_vertex_sample<S>(2, 30, 37, 9, false);
    check_vertex_sample<S>(2, 30, 37, 9, true);
  });
}
