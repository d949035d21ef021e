// Depthwise convolution of maps in channels_last, and its gradients: x (B, C, H, W), weight (C, KH, KW)
// -> (B, C, OH, OW), all float32. The result (oy, ox) reads from the input's (oy * stride - top,
// ox * stride - left) on, and zeros outside it.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/ceil_div.h"
#include "cpu/isa.h"
#include "cpu/maps.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace pahm {

struct DepthwiseConv {
  const float* in;      // (batch, height, width, channels), or the results' gradient
  const float* weight;  // (kernel_height * kernel_width, channels)
  float* out;
  int64_t batch, height, width, channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride, top, left;
};

}  // namespace pahm

#define PAHM_KERNEL_FILE "cpu/depthwise_conv.h"
#include "cpu/foreach_isa.h"

namespace pahm {
namespace {

void check_weight(const Tensor& t, int64_t channels) {
  check_cpu(t, "weight");
  check(t.dim() == 3 && t.scalar_type() == ScalarType::Float && t.size(0) == channels,
        "weight must be (C, KH, KW) and float32");
}

// A stride or a padding this large would overflow the sums of places.
void check_places(const DepthwiseConv& a) {
  constexpr int64_t most = int64_t{1} << 30;
  check(a.stride >= 1 && a.stride <= most, "stride must be from 1 to 2^30");
  check(a.top >= 0 && a.left >= 0 && a.top < a.kernel_height && a.left < a.kernel_width,
        "padding must be at least 0 and less than the kernel");
  for (const int64_t size : {a.height, a.width, a.out_height, a.out_width, a.kernel_height, a.kernel_width}) {
    check(size >= 0 && size <= most, "sizes must be from 0 to 2^30");
  }
}

int64_t row_work(const DepthwiseConv& a) {
  return a.out_width * a.channels * a.kernel_height * a.kernel_width;
}

// (channels, taps) to (taps, channels), with the taps in reverse order if asked for.
void lay_out(const Tensor& weight, float* to, bool reversed) {
  const int64_t channels = weight.size(0), taps = weight.size(1) * weight.size(2);
  const float* from = weight.const_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < taps; ++k) to[(reversed ? taps - 1 - k : k) * channels + c] = from[c * taps + k];
  }
}

void run_rows(const DepthwiseConv& a) {
  const Isa isa = active_isa();
  parallel_for(a.batch * a.out_height, row_work(a),
               [&](int64_t begin, int64_t end) { PAHM_ISA_CALL_AS(isa, depthwise_rows, a, begin, end); });
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight_, int64_t stride, int64_t top, int64_t left,
                      int64_t out_height, int64_t out_width) {
  check_map(x, "x");
  check_weight(weight_, x.size(1));
  const Tensor weight = as_contiguous(weight_);
  Scratch<float> taps(weight.numel());
  DepthwiseConv a{x.const_data_ptr<float>(),
                  taps.get(),
                  nullptr,
                  x.size(0),
                  x.size(2),
                  x.size(3),
                  x.size(1),
                  out_height,
                  out_width,
                  weight.size(1),
                  weight.size(2),
                  stride,
                  top,
                  left};
  check_places(a);
  Tensor out = new_empty_map(a.batch, a.channels, out_height, out_width);
  a.out = out.mutable_data_ptr<float>();
  lay_out(weight, taps.get(), false);
  run_rows(a);
  return out;
}

Tensor depthwise_conv_input_grad(const Tensor& grad, const Tensor& weight_, int64_t stride, int64_t top,
                                 int64_t left, int64_t height, int64_t width) {
  check_map(grad, "grad");
  check_weight(weight_, grad.size(1));
  const Tensor weight = as_contiguous(weight_);
  Scratch<float> taps(weight.numel());
  DepthwiseConv a{grad.const_data_ptr<float>(),
                  taps.get(),
                  nullptr,
                  grad.size(0),
                  height,
                  width,
                  grad.size(1),
                  grad.size(2),
                  grad.size(3),
                  weight.size(1),
                  weight.size(2),
                  stride,
                  top,
                  left};
  check_places(a);
  Tensor out = new_empty_map(a.batch, a.channels, height, width);
  a.out = out.mutable_data_ptr<float>();
  lay_out(weight, taps.get(), stride == 1);
  if (stride == 1) {  // The gradient is the convolution with the taps in reverse order.
    std::swap(a.height, a.out_height);
    std::swap(a.width, a.out_width);
    a.top = a.kernel_height - 1 - top;
    a.left = a.kernel_width - 1 - left;
    run_rows(a);
    return out;
  }
  const Isa isa = active_isa();
  parallel_for(a.batch * height, row_work(a), [&](int64_t begin, int64_t end) {
    PAHM_ISA_CALL_AS(isa, depthwise_grad_rows, a, begin, end);
  });
  return out;
}

Tensor depthwise_conv_weight_grad(const Tensor& grad, const Tensor& x, int64_t kernel_height,
                                  int64_t kernel_width, int64_t stride, int64_t top, int64_t left) {
  check_map(grad, "grad");
  check_map(x, "x");
  check(grad.size(0) == x.size(0) && grad.size(1) == x.size(1), "grad must have the batch and channels of x");
  DepthwiseConv a{x.const_data_ptr<float>(),
                  nullptr,
                  nullptr,
                  x.size(0),
                  x.size(2),
                  x.size(3),
                  x.size(1),
                  grad.size(2),
                  grad.size(3),
                  kernel_height,
                  kernel_width,
                  stride,
                  top,
                  left};
  check_places(a);
  const int64_t taps = product(kernel_height, kernel_width);
  Tensor out = new_empty<3>(x, {a.channels, kernel_height, kernel_width});
  Scratch<float> sums(product(taps, a.channels));
  a.out = sums.get();
  const float* from = grad.const_data_ptr<float>();
  const Isa isa = active_isa();
  // A block of channels at a time, so that each sum is taken in one order whatever the number of threads.
  constexpr int64_t block = 64;
  parallel_for(
      ceil_div(a.channels, block), a.batch * a.out_height * a.out_width * block * taps,
      [&](int64_t begin, int64_t end) { PAHM_ISA_CALL_AS(isa, depthwise_weight_grad, a, from, begin, end); });
  float* to = out.mutable_data_ptr<float>();
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int64_t k = 0; k < taps; ++k) to[c * taps + k] = a.out[k * a.channels + c];
  }
  return out;
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CPU, m) {
  m.impl("_depthwise_conv", TORCH_BOX(&pahm::depthwise_conv));
  m.impl("_depthwise_conv_input_grad", TORCH_BOX(&pahm::depthwise_conv_input_grad));
  m.impl("_depthwise_conv_weight_grad", TORCH_BOX(&pahm::depthwise_conv_weight_grad));
}
