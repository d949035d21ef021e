// Batch normalisation in training, with the clamp that follows it, and its gradient: x (..., C), float32,
// whose other dimensions are rows. The statistics are (2, C): each channel's mean and the reciprocal of its
// deviation.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/ceil_div.h"
#include "cpu/isa.h"
#include "cpu/maps.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pahm {

struct BatchNorm {
  const float* x;  // (rows, channels)
  int64_t rows, channels;
  int64_t group;                      // rows whose sums are taken together
  const float *scale, *shift, *mean;  // (channels); the result is scale * x + shift
  float low, high;                    // limits of the result
};

}  // namespace pahm

#define PAHM_KERNEL_FILE "cpu/batch_norm.h"
#include "cpu/foreach_isa.h"

namespace pahm {
namespace {

void check_vector(const Tensor& t, int64_t size, const char* name) {
  check_cpu(t, name);
  check(t.dim() == 1 && t.size(0) == size && t.scalar_type() == ScalarType::Float && t.is_contiguous(),
        [&] { return std::string(name) + " must have one number of float32 for each channel"; });
}

Tensor new_empty_like(const Tensor& map) {
  return new_empty_map(map.size(0), map.size(1), map.size(2), map.size(3));
}

BatchNorm checked(const Tensor& x, const Tensor& weight, const Tensor& bias, double low, double high) {
  check_map(x, "x");
  const int64_t channels = x.size(1);
  check_vector(weight, channels, "weight");
  check_vector(bias, channels, "bias");
  check(channels > 0 && x.numel() >= channels, "x must have a pixel and a channel");
  // Groups depend on the shape alone, so that the sums do not depend on the number of threads. 32 KiB of x
  // stay in the cache between the two passes over them.
  const int64_t group = std::max<int64_t>(1, 8192 / channels);
  return {x.const_data_ptr<float>(), x.numel() / channels,    channels, group, nullptr, nullptr, nullptr,
          static_cast<float>(low),   static_cast<float>(high)};
}

// Scale and shift of the result.
std::vector<float> affine(const Tensor& weight, const Tensor& bias, const float* mean, const float* inverse) {
  const int64_t channels = weight.size(0);
  const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
  std::vector<float> made(static_cast<size_t>(2 * channels));
  for (int64_t c = 0; c < channels; ++c) {
    made[c] = w[c] * inverse[c];
    made[channels + c] = b[c] - mean[c] * made[c];
  }
  return made;
}

// The sum over groups of a (groups, channels) table.
std::vector<double> totals(const float* table, int64_t groups, int64_t channels) {
  std::vector<double> sums(static_cast<size_t>(channels));
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += table[g * channels + c];
  }
  return sums;
}

std::tuple<Tensor, Tensor> batch_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      const Tensor& running_mean, const Tensor& running_variance,
                                      double momentum, double epsilon, double low, double high) {
  BatchNorm a = checked(x, weight, bias, low, high);
  check_vector(running_mean, a.channels, "running_mean");
  check_vector(running_variance, a.channels, "running_variance");
  check(a.rows > 1, "x must have more than one number in a channel");
  const Isa isa = active_isa();
  const int64_t groups = ceil_div(a.rows, a.group);
  Scratch<float> partial(2 * groups * a.channels);
  float *means = partial.get(), *squares = partial.get() + groups * a.channels;
  parallel_for(groups, a.group * a.channels, [&](int64_t begin, int64_t end) {
    PAHM_ISA_CALL_AS(isa, batch_norm_moments, a, means, squares, begin, end);
  });

  // Chan's formula joins the groups.
  const double rows = static_cast<double>(a.rows);
  std::vector<double> mean(static_cast<size_t>(a.channels));
  const auto size = [&](int64_t g) { return static_cast<double>(std::min(a.group, a.rows - g * a.group)); };
  for (int64_t g = 0; g < groups; ++g) {
    const double share = size(g) / rows;
    for (int64_t c = 0; c < a.channels; ++c) mean[c] += share * means[g * a.channels + c];
  }
  std::vector<double> square = totals(squares, groups, a.channels);
  for (int64_t g = 0; g < groups; ++g) {
    const double count = size(g);
    for (int64_t c = 0; c < a.channels; ++c) {
      const double distance = means[g * a.channels + c] - mean[c];
      square[c] += count * distance * distance;
    }
  }

  Tensor statistics = new_empty<2>(x, {2, a.channels});
  float *kept = statistics.mutable_data_ptr<float>(), *inverse = kept + a.channels;
  float *past_mean = running_mean.mutable_data_ptr<float>(),
        *past_variance = running_variance.mutable_data_ptr<float>();
  for (int64_t c = 0; c < a.channels; ++c) {
    kept[c] = static_cast<float>(mean[c]);
    inverse[c] = static_cast<float>(1 / std::sqrt(square[c] / rows + epsilon));
    const double unbiased = square[c] / (rows - 1);
    past_mean[c] = static_cast<float>((1 - momentum) * past_mean[c] + momentum * mean[c]);
    past_variance[c] = static_cast<float>((1 - momentum) * past_variance[c] + momentum * unbiased);
  }

  const std::vector<float> made = affine(weight, bias, kept, inverse);
  a.scale = made.data();
  a.shift = made.data() + a.channels;
  Tensor out = new_empty_like(x);
  float* to = out.mutable_data_ptr<float>();
  parallel_for(a.rows, a.channels, [&](int64_t begin, int64_t end) {
    PAHM_ISA_CALL_AS(isa, batch_norm_rows, a, to, begin, end);
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& weight, const Tensor& bias,
                                                       const Tensor& statistics, double low, double high) {
  BatchNorm a = checked(x, weight, bias, low, high);
  check_map(grad, "grad");
  for (const int64_t d : {0, 1, 2, 3}) check(grad.size(d) == x.size(d), "grad must have the shape of x");
  check_cpu(statistics, "statistics");
  check(statistics.dim() == 2 && statistics.size(0) == 2 && statistics.size(1) == a.channels &&
            statistics.scalar_type() == ScalarType::Float && statistics.is_contiguous(),
        "statistics must be (2, C), contiguous and float32");
  const float *g = grad.const_data_ptr<float>(), *mean = statistics.const_data_ptr<float>(),
              *inverse = mean + a.channels;
  const std::vector<float> made = affine(weight, bias, mean, inverse);
  a.scale = made.data();
  a.shift = made.data() + a.channels;
  a.mean = mean;
  const Isa isa = active_isa();
  const int64_t groups = ceil_div(a.rows, a.group);
  Scratch<float> partial(2 * groups * a.channels);
  float *sums = partial.get(), *products = partial.get() + groups * a.channels;
  parallel_for(groups, a.group * a.channels, [&](int64_t begin, int64_t end) {
    PAHM_ISA_CALL_AS(isa, batch_norm_grad_sums, a, g, sums, products, begin, end);
  });
  const std::vector<double> sum = totals(sums, groups, a.channels);
  const std::vector<double> product = totals(products, groups, a.channels);

  Tensor weight_grad = new_empty<1>(x, {a.channels}), bias_grad = new_empty<1>(x, {a.channels});
  float *to_weight = weight_grad.mutable_data_ptr<float>(), *to_bias = bias_grad.mutable_data_ptr<float>();
  std::vector<float> line(static_cast<size_t>(2 * a.channels));
  float *slope = line.data(), *offset = slope + a.channels;
  const double rows = static_cast<double>(a.rows);
  for (int64_t c = 0; c < a.channels; ++c) {
    const double change = product[c] * inverse[c], factor = -a.scale[c] / rows;
    to_weight[c] = static_cast<float>(change);
    to_bias[c] = static_cast<float>(sum[c]);
    slope[c] = static_cast<float>(factor * change * inverse[c]);
    offset[c] = static_cast<float>(factor * (sum[c] - change * inverse[c] * mean[c]));
  }
  Tensor x_grad = new_empty_like(x);
  float* to = x_grad.mutable_data_ptr<float>();
  parallel_for(a.rows, a.channels, [&](int64_t begin, int64_t end) {
    PAHM_ISA_CALL_AS(isa, batch_norm_grad_rows, a, g, slope, offset, to, begin, end);
  });
  return {x_grad, weight_grad, bias_grad};
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CPU, m) {
  m.impl("_batch_norm", TORCH_BOX(&pahm::batch_norm));
  m.impl("_batch_norm_backward", TORCH_BOX(&pahm::batch_norm_backward));
}
