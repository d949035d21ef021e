#include "check.h"

#include "cpu/frozen.cpp"

namespace {

using namespace pahm;
namespace kernels = pahm::isa_baseline;

constexpr int64_t lanes = 4, panel = 8;

struct Map {
  int64_t batch, height, width, channels;
  std::vector<float> data = random_numbers<float>(batch * height * width * channels);
  double at(int64_t b, int64_t y, int64_t x, int64_t c) const {
    if (y < 0 || y >= height || x < 0 || x >= width) return 0;
    return data[((b * height + y) * width + x) * channels + c];
  }
};

// (outputs, inputs) in panels of two vectors of outputs, the last one or two.
std::vector<float> in_panels(const std::vector<float>& weight, int64_t outputs, int64_t inputs) {
  const int64_t padded = (outputs + lanes - 1) / lanes * lanes;
  std::vector<float> found;
  for (int64_t first = 0; first < padded; first += panel) {
    const int64_t width = std::min(panel, padded - first);
    for (int64_t k = 0; k < inputs; ++k) {
      for (int64_t j = first; j < first + width; ++j) {
        found.push_back(j < outputs ? weight[j * inputs + k] : 0.0f);
      }
    }
  }
  return found;
}

// A 3 x 3 convolution with relu and a residual sum, by tables and by Winograd's algorithm.
void check_convolution(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs) {
  const Map in{batch, height, width, channels};
  const int64_t pixels = height * width, inputs = 9 * channels;
  const auto weight = random_numbers<float>(outputs * inputs);  // (outputs, taps, channels)
  auto bias = random_numbers<float>(outputs);
  const auto added = random_numbers<float>(batch * pixels * outputs);
  const std::vector<float> zeros(static_cast<size_t>(channels));
  std::vector<double> wanted;
  std::vector<int32_t> table(static_cast<size_t>(9 * pixels));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t o = 0; o < outputs; ++o) {
        double sum = bias[o];
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t y = p / width + tap / 3 - 1, x = p % width + tap % 3 - 1;
          const bool inside = y >= 0 && y < height && x >= 0 && x < width;
          table[tap * pixels + p] = static_cast<int32_t>(inside ? y * width + x : -1);
          for (int64_t c = 0; c < channels; ++c) {
            sum += weight[(o * 9 + tap) * channels + c] * in.at(b, y, x, c);
          }
        }
        wanted.push_back(std::max(sum, 0.0) + added[(b * pixels + p) * outputs + o]);
      }
    }
  }
  bias.resize(static_cast<size_t>((outputs + lanes - 1) / lanes * lanes));

  std::vector<float> out(wanted.size());
  std::vector<ProductSource> sources;
  for (int64_t tap = 0; tap < 9; ++tap) {
    sources.push_back({{in.data.data(), channels}, pixels, channels, table.data() + tap * pixels});
  }
  const auto panels = in_panels(weight, outputs, inputs);
  Product product{};
  product.sources = sources.data();
  product.source_count = 9;
  product.inputs = inputs;
  product.batch = batch;
  product.rows = pixels;
  product.columns = outputs;
  product.weight = panels.data();
  product.bias = bias.data();
  product.zeros = zeros.data();
  product.added = {added.data(), outputs};
  product.residual = Residual::after_activation;
  product.activation = Activation::relu;
  product.out = {out.data(), outputs};
  kernels::cut(product);
  kernels::run_items(product, 0, kernels::item_count(product));
  check_close("product", out, wanted);

  const double g[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  std::vector<float> transformed;  // (outputs, 16, channels)
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t k = 0; k < 16; ++k) {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t tap = 0; tap < 9; ++tap) {
          sum += g[k / 4][tap / 3] * g[k % 4][tap % 3] * weight[(o * 9 + tap) * channels + c];
        }
        transformed.push_back(static_cast<float>(sum));
      }
    }
  }
  const auto winograd_panels = in_panels(transformed, outputs, 16 * channels);
  std::vector<float> scratch(static_cast<size_t>(winograd_scratch(channels)));
  Winograd winograd{};
  winograd.batch = batch;
  winograd.height = height;
  winograd.width = width;
  winograd.channels = channels;
  winograd.columns = outputs;
  winograd.in = {in.data.data(), channels};
  winograd.weight = winograd_panels.data();
  winograd.bias = bias.data();
  winograd.zeros = zeros.data();
  winograd.added = product.added;
  winograd.residual = product.residual;
  winograd.activation = product.activation;
  winograd.scratch = scratch.data();
  winograd.slots = 1;
  winograd.out = product.out;
  std::fill(out.begin(), out.end(), 0.0f);
  kernels::cut(winograd);
  kernels::run_items(winograd, 0, kernels::item_count(winograd), 0);
  check_close("winograd", out, wanted);
}

void check_depthwise(int64_t channels, int64_t kernel, int64_t stride) {
  const Map in{2, 9, 11, channels};
  const int64_t pad = kernel / 2, height = (9 + 2 * pad - kernel) / stride + 1;
  const int64_t width = (11 + 2 * pad - kernel) / stride + 1;
  const auto weight = random_numbers<float>(kernel * kernel * channels);
  const auto bias = random_numbers<float>(channels);
  std::vector<double> wanted;
  for (int64_t row = 0; row < 2 * height * width; ++row) {
    const int64_t y = row / width % height * stride - pad, x = row % width * stride - pad;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = bias[c];
      for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
        sum +=
            weight[tap * channels + c] * in.at(row / width / height, y + tap / kernel, x + tap % kernel, c);
      }
      wanted.push_back(std::clamp(sum, 0.0, 6.0));
    }
  }
  std::vector<float> out(wanted.size());
  const Depthwise a{2,
                    9,
                    11,
                    channels,
                    height,
                    width,
                    kernel,
                    kernel,
                    stride,
                    stride,
                    pad,
                    pad,
                    {in.data.data(), channels},
                    weight.data(),
                    bias.data(),
                    Activation::relu6,
                    {out.data(), channels}};
  kernels::run_items(a, 0, kernels::item_count(a));
  check_close("depthwise", out, wanted);
}

void check_attention(int64_t vertices, int64_t heads, int64_t channels) {
  const int64_t width = heads * channels;
  const auto packed = random_numbers<float>(vertices * 3 * width);
  const auto number = [&](int64_t n, int64_t part, int64_t h, int64_t d) {
    return static_cast<double>(packed[n * 3 * width + part * width + h * channels + d]);
  };
  std::vector<double> wanted(static_cast<size_t>(vertices * width));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < vertices; ++i) {
      std::vector<double> scores;
      double total = 0;
      for (int64_t j = 0; j < vertices; ++j) {
        double dot = 0;
        for (int64_t d = 0; d < channels; ++d) dot += number(i, 0, h, d) * number(j, 1, h, d);
        scores.push_back(std::exp(0.3 * dot));
        total += scores.back();
      }
      for (int64_t j = 0; j < vertices; ++j) {
        for (int64_t d = 0; d < channels; ++d) {
          wanted[i * width + h * channels + d] += scores[j] / total * number(j, 2, h, d);
        }
      }
    }
  }
  std::vector<float> out(wanted.size()),
      scratch(static_cast<size_t>(heads * attention_scratch(vertices, channels)));
  const float* q = packed.data();
  const Attention a{1,
                    vertices,
                    heads,
                    channels,
                    0.3,
                    {q, 3 * width},
                    {q + width, 3 * width},
                    {q + 2 * width, 3 * width},
                    scratch.data(),
                    {out.data(), width}};
  kernels::run_items(a, 0, kernels::item_count(a));
  check_close("attention", out, wanted);
}

}  // namespace

int main() {
  return run([](auto zero) {
    if constexpr (std::is_same_v<decltype(zero), float>) {
      check_convolution(2, 7, 6, 8, 21);
      check_convolution(1, 12, 12, 16, 5);
      check_depthwise(13, 3, 1);
      check_depthwise(72, 5, 2);
      check_attention(29, 3, 5);
      check_attention(40, 2, 16);
    }
  });
}
