#include "check.h"

#include "cpu/spiral_conv.cpp"

namespace {

using pahm::ComputeType;

template <typename S>
void check_spiral_conv(const pahm::SpiralShape& s) {
  using T = ComputeType<S>;
  const int64_t K = s.length * s.channels, rows = s.batch * s.rows;
  const auto x = random_numbers<T>(s.batch * s.vertices * s.channels),
             weight = random_numbers<T>(s.out_channels * K);
  const auto bias = random_numbers<T>(s.out_channels), grad = random_numbers<T>(rows * s.out_channels);
  const auto table = random_indices(s.length * s.rows, s.vertices);
  std::vector<S> out(static_cast<size_t>(rows * s.out_channels));
  std::vector<S> x_grad(x.size());
  std::vector<double> wanted(out.size()), wanted_x(x.size()), wanted_weight(weight.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < s.out_channels; ++o) {
      double sum = bias[o];
      const double g = grad[r * s.out_channels + o];
      for (int64_t l = 0; l < s.length; ++l) {
        const int64_t n = r / s.rows * s.vertices + table[l * s.rows + r % s.rows];
        for (int64_t c = 0; c < s.channels; ++c) {
          const double w = weight[o * K + l * s.channels + c], v = x[n * s.channels + c];
          sum += w * v;
          wanted_x[n * s.channels + c] += w * g;
          wanted_weight[o * K + l * s.channels + c] += v * g;
        }
      }
      wanted[r * s.out_channels + o] = std::max(0.0, sum);
    }
  }
  pahm::SpiralTiling tiling{};
  pahm::isa_baseline::spiral_tiling<T>(tiling);
  const pahm::SpiralForward<S> forward{s,           x.data(),   table.data(),          weight.data(),
                                       bias.data(), out.data(), pahm::Activation::relu};
  if (s.out_channels <= 4) {
    pahm::isa_baseline::spiral_forward_narrow<S>(forward, 0, rows);
  } else {
    const pahm::Scratch<T> panel(K * tiling.panel);
    const int64_t tiles = pahm::ceil_div(s.out_channels, tiling.panel) * pahm::ceil_div(rows, tiling.rows);
    pahm::isa_baseline::spiral_forward<S>(forward, panel.get(), 0, tiles);
  }
  check_close("spiral_conv", out, wanted);

  const pahm::SpiralInputGrad<S> input_grad{s, grad.data(), table.data(), weight.data(), x_grad.data()};
  const int64_t panels = pahm::ceil_div(s.channels, tiling.panel);
  const pahm::Scratch<T> panel(s.length * s.out_channels * tiling.panel), sums(s.vertices * tiling.panel);
  pahm::isa_baseline::spiral_input_grad<S>(input_grad, panel.get(), sums.get(), 0, panels * s.batch);
  check_close("its input gradient", x_grad, wanted_x);

  if constexpr (std::is_same_v<S, T>) {
    std::vector<T> weight_grad(weight.size());
    pahm::SpiralWeightGrad<T> arguments{s, grad.data(), x.data(), table.data(), weight_grad.data()};
    int64_t items = 0;
    pahm::isa_baseline::spiral_weight_grad_plan<T>(arguments, items);
    pahm::isa_baseline::spiral_weight_grad<T>(arguments, 0, items);
    check_close("its weight gradient", weight_grad, wanted_weight);
  }
}

}  // namespace

int main() {
  return run([](auto zero) {
    using S = decltype(zero);
    const int64_t vector = 16 / static_cast<int64_t>(sizeof(ComputeType<S>));
    check_spiral_conv<S>({2, 50, 41, 5, 12 * vector, 37});
    check_spiral_conv<S>({3, 20, 23, 3, 3 * vector, 3});
    check_spiral_conv<S>({1, 30, 30, 2, vector, 16});
  });
}
