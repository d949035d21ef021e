// spiral_conv and its two gradients on a GPU. Indices out of range are ignored: the device cannot raise, and
// Python has checked the indices.
#include "kernels/spiral_conv.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/launch.h"

namespace pahm {
namespace {

// The sizes in the types that the kernels use.
SpiralSizes sizes_of(int64_t batch, int64_t vertices, int64_t rows, int64_t length, int64_t channels,
                     int64_t out_channels) {
  check_small("the number of vertices", vertices);
  check_small("the number of rows", rows);
  check_small("the spiral length", length);
  check_small("the number of indices", length * rows);
  check_small("the number of channels", channels);
  check_small("the number of output channels", out_channels);
  return {batch,
          static_cast<int>(vertices),
          static_cast<int>(rows),
          static_cast<int>(length),
          static_cast<int>(channels),
          static_cast<int>(out_channels)};
}

// Launches a product and allocates memory for the sums of its splits.
template <typename Product>
void run(const typename Product::Arguments& arguments, const Tensor& like, const OnDeviceOf& on) {
  ProductPlan plan = plan_product<Product>(arguments, on.device().processors);
  std::optional<Tensor> partial;
  if (const int64_t bytes = partial_bytes<Product>(arguments, plan); bytes > 0) {
    partial = new_empty<1>(like, {bytes}, ScalarType::Byte);
    plan.partial = partial->mutable_data_ptr();
  }
  product_launch<Product>(arguments, plan, on.device());
}

Tensor spiral_conv(const Tensor& x_, const Tensor& table_, const Tensor&, const Tensor&,
                   const Tensor& weight_, const std::optional<Tensor>& bias_, int64_t activation) {
  const Tensor x = first_operand(x_, 3, "x");
  const ScalarType type = x.scalar_type();
  const Tensor table = operand(table_, x, ScalarType::Int, 2, "table");
  const Tensor weight = operand(weight_, x, type, 2, "weight");
  std::optional<Tensor> bias;
  if (bias_) bias = operand(*bias_, x, type, 1, "bias");
  const int64_t batch = x.size(0), channels = x.size(2), length = table.size(0), rows = table.size(1);
  const int64_t out_channels = weight.size(0);
  const SpiralSizes sizes = sizes_of(batch, x.size(1), rows, length, channels, out_channels);
  check(length > 0 && weight.size(1) == length * channels, "weight must be (Cout, L * C)");
  check(!bias || bias->numel() == out_channels, "bias must be (Cout,)");
  check(activation >= 0 && activation <= gelu, "activation must be 0, 1, 2 or 3");

  Tensor out = new_empty<3>(x, {batch, rows, out_channels});
  if (out.numel() == 0) return out;
  if (channels == 0) {  // An empty sum: treat it as one channel of zeros.
    return spiral_conv(torch::stable::new_zeros(x, {batch, x.size(1), 1}), table, table, table,
                       torch::stable::new_zeros(weight, {out_channels, length}), bias, activation);
  }
  const OnDeviceOf on(x);
  dispatch_floating<bfloat16, half>(type, [&](auto zero) {
    using S = decltype(zero);
    const SpiralConvArguments<S> arguments{sizes,
                                           pointer<S>(x),
                                           pointer<int32_t>(table),
                                           pointer<S>(weight),
                                           bias ? pointer<S>(*bias) : nullptr,
                                           static_cast<int>(activation),
                                           mutable_pointer<S>(out)};
    run<SpiralForward<S>>(arguments, x, on);
  });
  return out;
}

Tensor spiral_conv_input_grad(const Tensor& grad_, const Tensor& table_, const Tensor& t_pointers_,
                              const Tensor& t_rows_, const Tensor& weight_, int64_t vertices) {
  const Tensor grad = first_operand(grad_, 3, "grad");
  const ScalarType type = grad.scalar_type();
  const Tensor t_pointers = operand(t_pointers_, grad, ScalarType::Int, 1, "t_pointers");
  const Tensor t_rows = operand(t_rows_, grad, ScalarType::Int, 1, "t_rows");
  const Tensor weight = operand(weight_, grad, type, 2, "weight");
  const int64_t batch = grad.size(0), rows = grad.size(1), out_channels = grad.size(2);
  check_rank(table_, 2, "table");
  const int64_t length = table_.size(0);
  check(length > 0 && table_.size(1) == rows, "table must be (L, M) for grad (B, M, Cout)");
  check(t_rows.numel() == length * rows, "t_rows must be (L * M,)");
  check_small("vertices", vertices);
  check_small("the spiral length", length);
  check(vertices >= 0 && t_pointers.numel() == vertices * length + 1,
        "t_pointers must be (L * vertices + 1,)");
  check(weight.size(0) == out_channels, "weight must be (Cout, L * C)");
  check(weight.size(1) % length == 0, "weight must be (Cout, L * C)");
  const int64_t channels = weight.size(1) / length;

  const SpiralSizes sizes = sizes_of(batch, vertices, rows, length, channels, out_channels);
  Tensor out = new_empty<3>(grad, {batch, vertices, channels});
  if (out.numel() == 0) return out;
  if (grad.numel() == 0) return torch::stable::zero_(out);
  const OnDeviceOf on(grad);
  dispatch_floating<bfloat16, half>(type, [&](auto zero) {
    using S = decltype(zero);
    const SpiralInputGradArguments<S> arguments{sizes,
                                                pointer<S>(grad),
                                                pointer<int32_t>(t_pointers),
                                                pointer<int32_t>(t_rows),
                                                pointer<S>(weight),
                                                mutable_pointer<S>(out)};
    run<SpiralInputGrad<S>>(arguments, grad, on);
  });
  return out;
}

Tensor spiral_conv_weight_grad(const Tensor& grad_, const Tensor& x_, const Tensor& table_, const Tensor&,
                               const Tensor&) {
  const Tensor grad = first_operand(grad_, 3, "grad");
  const ScalarType type = grad.scalar_type();
  const Tensor x = operand(x_, grad, type, 3, "x");
  const Tensor table = operand(table_, grad, ScalarType::Int, 2, "table");
  const int64_t batch = grad.size(0), rows = grad.size(1), out_channels = grad.size(2);
  const int64_t length = table.size(0), channels = x.size(2);
  check(x.size(0) == batch && table.size(1) == rows,
        "grad must be (B, M, Cout) for x (B, N, C) and table (L, M)");

  const SpiralSizes sizes = sizes_of(batch, x.size(1), rows, length, channels, out_channels);
  Tensor out = new_empty<2>(grad, {out_channels, length * channels});
  if (out.numel() == 0) return out;
  if (grad.numel() == 0) return torch::stable::zero_(out);
  const OnDeviceOf on(grad);
  dispatch_floating<bfloat16, half>(type, [&](auto zero) {
    using S = decltype(zero);
    const SpiralWeightGradArguments<S> arguments{sizes, pointer<S>(grad), pointer<S>(x),
                                                 pointer<int32_t>(table), mutable_pointer<S>(out)};
    run<SpiralWeightGrad<S>>(arguments, grad, on);
  });
  return out;
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CUDA, m) {
  m.impl("spiral_conv", TORCH_BOX(&pahm::spiral_conv));
  m.impl("_spiral_conv_input_grad", TORCH_BOX(&pahm::spiral_conv_input_grad));
  m.impl("_spiral_conv_weight_grad", TORCH_BOX(&pahm::spiral_conv_weight_grad));
}
