// spiral_conv and its two gradients: x (B, N, C), table (L, M), weight (Cout, L * C), bias (Cout,) -> (B, M,
// Cout), with an activation. Only the GPU uses the lists of the transposed table.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>

#include "cpu/isa.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/spiral_conv_shared.h"

namespace pahm {

template <typename S>
using ComputeType = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename S>
struct SpiralForward {
  SpiralShape shape;
  const ComputeType<S>* x;       // (B, N, C)
  const int32_t* table;          // (L, M)
  const ComputeType<S>* weight;  // (Cout, L * C)
  const ComputeType<S>* bias;    // (Cout), or null
  S* out;                        // (B, M, Cout)
  Activation activation;
};

template <typename S>
struct SpiralInputGrad {
  SpiralShape shape;
  const ComputeType<S>* grad;    // (B, M, Cout)
  const int32_t* table;          // (L, M)
  const ComputeType<S>* weight;  // (Cout, L * C)
  S* out;                        // (B, N, C)
};

template <typename T>
struct SpiralWeightGrad {
  SpiralShape shape;
  const T* grad;                 // (B, M, Cout)
  const T* x;                    // (B, N, C)
  const int32_t* table;          // (L, M)
  T* out;                        // (Cout, L, C)
  int64_t meshes = 1, rows = 1;  // processed at a time: whole meshes, or rows of one
};

struct SpiralTiling {
  int64_t rows;   // in a tile of results
  int64_t panel;  // output channels in a tile
  int64_t lanes;  // numbers in a vector
};

}  // namespace pahm

#define PAHM_KERNEL_FILE "cpu/spiral_conv.h"
#include "cpu/foreach_isa.h"

namespace pahm {
namespace {

using c10::BFloat16;

Tensor compute_copy(const Tensor& t) { return as_contiguous(of_type(t, compute_type(t.scalar_type()))); }

template <typename T>
SpiralTiling tiling_of(Isa isa) {
  SpiralTiling tiling{};
  PAHM_ISA_CALL_AS(isa, spiral_tiling<T>, tiling);
  return tiling;
}

Tensor spiral_conv(const Tensor& x_, const Tensor& table_, const Tensor&, const Tensor&,
                   const Tensor& weight_, const std::optional<Tensor>& bias_, int64_t activation) {
  const Tensor table = index_table(table_, 2, "table");
  check_cpu(x_, "x");
  check_cpu(weight_, "weight");
  check(x_.dim() == 3 && weight_.dim() == 2, "x must be (B, N, C) and weight (Cout, L * C)");
  check_same_type(x_, weight_, "weight");
  const SpiralShape shape{x_.size(0), x_.size(1), table.size(1), table.size(0), x_.size(2), weight_.size(0)};
  check(shape.length > 0, "table must name at least one vertex a row");
  check(weight_.size(1) == product(shape.length, shape.channels), "weight must be (Cout, L * C)");
  product(product(shape.batch, shape.rows), product(shape.length, shape.channels));
  check_range(table, shape.vertices, "indices");
  if (bias_.has_value()) {
    check_cpu(*bias_, "bias");
    check(bias_->dim() == 1 && bias_->size(0) == shape.out_channels, "bias must be (Cout,)");
    check_same_type(x_, *bias_, "bias");
  }
  check(activation >= 0 && activation <= static_cast<int64_t>(Activation::gelu), "activation must be 0 to 3");
  const Isa isa = active_isa();
  Tensor out = new_empty<3>(x_, {shape.batch, shape.rows, shape.out_channels});
  if (out.numel() == 0) return out;
  const Tensor bias = bias_.has_value() ? compute_copy(*bias_) : weight_;
  if (x_.scalar_type() == ScalarType::BFloat16 && multiplies_bf16(isa, shape)) {
    const Tensor x = as_contiguous(x_), weight = as_contiguous(weight_);
    spiral_conv_bf16(isa, shape, x.const_data_ptr<BFloat16>(), table.const_data_ptr<int32_t>(),
                     weight.const_data_ptr<BFloat16>(),
                     bias_.has_value() ? bias.const_data_ptr<float>() : nullptr,
                     static_cast<Activation>(activation), out.mutable_data_ptr<BFloat16>());
    return out;
  }
  const Tensor x = compute_copy(x_), weight = compute_copy(weight_);
  dispatch_floating<BFloat16>(x_.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = ComputeType<S>;
    const SpiralTiling tiling = tiling_of<T>(isa);
    const int64_t K = shape.length * shape.channels, rows = shape.batch * shape.rows;
    const SpiralForward<S> arguments{shape,
                                     x.const_data_ptr<T>(),
                                     table.const_data_ptr<int32_t>(),
                                     weight.const_data_ptr<T>(),
                                     bias_.has_value() ? bias.const_data_ptr<T>() : nullptr,
                                     out.mutable_data_ptr<S>(),
                                     static_cast<Activation>(activation)};
    if (shape.out_channels <= 4 && shape.channels >= tiling.lanes) {
      parallel_for(rows, K * shape.out_channels, [&](int64_t begin, int64_t end) {
        PAHM_ISA_CALL_AS(isa, spiral_forward_narrow<S>, arguments, begin, end);
      });
      return;
    }
    const int64_t tiles = ceil_div(shape.out_channels, tiling.panel) * ceil_div(rows, tiling.rows);
    parallel_for(tiles, K * tiling.rows * tiling.panel, [&](int64_t begin, int64_t end) {
      const Scratch<T> panel(K * tiling.panel);
      PAHM_ISA_CALL_AS(isa, spiral_forward<S>, arguments, panel.get(), begin, end);
    });
  });
  return out;
}

Tensor spiral_conv_input_grad(const Tensor& grad_, const Tensor& table_, const Tensor&, const Tensor&,
                              const Tensor& weight_, int64_t vertices) {
  const Tensor table = index_table(table_, 2, "table");
  check_cpu(grad_, "grad");
  check_cpu(weight_, "weight");
  check(grad_.dim() == 3 && weight_.dim() == 2, "grad must be (B, M, Cout) and weight (Cout, L * C)");
  check_same_type(grad_, weight_, "weight");
  const int64_t length = table.size(0), width = weight_.size(1);
  check(length > 0, "table must name at least one vertex a row");
  check(width % length == 0, "weight must be (Cout, L * C)");
  const SpiralShape shape{grad_.size(0), vertices, table.size(1), length, width / length, weight_.size(0)};
  check(vertices >= 0 && grad_.size(1) == shape.rows && grad_.size(2) == shape.out_channels,
        "grad must be (B, M, Cout)");
  check_range(table, vertices, "indices");
  const Isa isa = active_isa();
  Tensor out = new_empty<3>(grad_, {shape.batch, vertices, shape.channels});
  if (out.numel() == 0) return out;
  if (grad_.scalar_type() == ScalarType::BFloat16 && multiplies_bf16(isa, shape)) {
    const Tensor grad = as_contiguous(grad_), weight = as_contiguous(weight_);
    spiral_conv_input_grad_bf16(isa, shape, grad.const_data_ptr<BFloat16>(), table.const_data_ptr<int32_t>(),
                                weight.const_data_ptr<BFloat16>(), out.mutable_data_ptr<BFloat16>());
    return out;
  }
  const Tensor grad = compute_copy(grad_), weight = compute_copy(weight_);
  dispatch_floating<BFloat16>(grad_.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = ComputeType<S>;
    const SpiralTiling tiling = tiling_of<T>(isa);
    const int64_t panels = ceil_div(shape.channels, tiling.panel), K = shape.length * shape.out_channels;
    const SpiralInputGrad<S> arguments{shape, grad.const_data_ptr<T>(), table.const_data_ptr<int32_t>(),
                                       weight.const_data_ptr<T>(), out.mutable_data_ptr<S>()};
    parallel_for(panels * shape.batch, shape.rows * K * tiling.panel, [&](int64_t begin, int64_t end) {
      const Scratch<T> panel(K * tiling.panel), sums(shape.vertices * tiling.panel);
      PAHM_ISA_CALL_AS(isa, spiral_input_grad<S>, arguments, panel.get(), sums.get(), begin, end);
    });
  });
  return out;
}

Tensor spiral_conv_weight_grad(const Tensor& grad_, const Tensor& x_, const Tensor& table_, const Tensor&,
                               const Tensor&) {
  const Tensor table = index_table(table_, 2, "table");
  check_cpu(grad_, "grad");
  check_cpu(x_, "x");
  check(grad_.dim() == 3 && x_.dim() == 3 && grad_.size(0) == x_.size(0) && grad_.size(1) == table.size(1),
        "grad must be (B, M, Cout) and x (B, N, C)");
  check_same_type(grad_, x_, "x");
  const SpiralShape shape{x_.size(0), x_.size(1), table.size(1), table.size(0), x_.size(2), grad_.size(2)};
  check(shape.length > 0, "table must name at least one vertex a row");
  product(product(shape.batch, shape.rows),
          product(product(shape.length, shape.channels), shape.out_channels));
  check_range(table, shape.vertices, "indices");
  const Isa isa = active_isa();
  const ScalarType type = compute_type(x_.scalar_type());
  if (shape.batch * shape.rows == 0) {
    return torch::stable::new_zeros(x_, {shape.out_channels, shape.length * shape.channels});
  }
  if (x_.scalar_type() == ScalarType::BFloat16 && multiplies_bf16(isa, shape) && shape.out_channels > 0) {
    const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_);
    Tensor out = new_empty<2>(x, {shape.out_channels, shape.length * shape.channels});
    spiral_conv_weight_grad_bf16(isa, shape, grad.const_data_ptr<BFloat16>(), x.const_data_ptr<BFloat16>(),
                                 table.const_data_ptr<int32_t>(), out.mutable_data_ptr<BFloat16>());
    return out;
  }
  const Tensor grad = compute_copy(grad_), x = compute_copy(x_);
  const int64_t K = shape.length * shape.channels;
  Tensor out = new_empty<2>(x, {shape.out_channels, K});
  if (out.numel() > 0) {
    dispatch_floating<BFloat16>(type, [&](auto zero) {
      using T = ComputeType<decltype(zero)>;
      SpiralWeightGrad<T> arguments{shape, grad.const_data_ptr<T>(), x.const_data_ptr<T>(),
                                    table.const_data_ptr<int32_t>(), out.mutable_data_ptr<T>()};
      int64_t items = 0;
      PAHM_ISA_CALL_AS(isa, spiral_weight_grad_plan<T>, arguments, items);
      const int64_t work = shape.batch * shape.rows * shape.out_channels * K / items;
      parallel_for(items, work, [&](int64_t begin, int64_t end) {
        PAHM_ISA_CALL_AS(isa, spiral_weight_grad<T>, arguments, begin, end);
      });
    });
  }
  return of_type(out, x_.scalar_type());
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CPU, m) {
  m.impl("spiral_conv", TORCH_BOX(&pahm::spiral_conv));
  m.impl("_spiral_conv_input_grad", TORCH_BOX(&pahm::spiral_conv_input_grad));
  m.impl("_spiral_conv_weight_grad", TORCH_BOX(&pahm::spiral_conv_weight_grad));
}
