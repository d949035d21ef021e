// mesh_pool on a GPU: x (B, N, C), a CSR matrix (M, N) -> (B, M, C).
// Indices out of range are ignored: the device cannot raise, and Python has checked the indices.
#include "kernels/mesh_pool.cuh"

#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"

namespace pahm {
namespace {

Tensor mesh_pool(const Tensor& x_, const Tensor& row_pointers_, const Tensor& columns_, const Tensor& values_,
                 const Tensor&, const Tensor&, const Tensor&) {
  const Tensor x = first_operand(x_, 3, "x");
  const ScalarType type = x.scalar_type();
  const Tensor row_pointers = operand(row_pointers_, x, ScalarType::Int, 1, "row_pointers");
  const Tensor columns = operand(columns_, x, ScalarType::Int, 1, "columns");
  const bool wide = values_.scalar_type() == ScalarType::Double;
  const Tensor values = operand(values_, x, wide ? ScalarType::Double : ScalarType::Float, 1, "values");
  check(row_pointers.numel() > 0, "row_pointers must have one number more than there are rows, got none");
  check(values.numel() == columns.numel(), "values must have one number a column index");

  const int64_t batch = x.size(0), rows = row_pointers.numel() - 1, channels = x.size(2);
  check_small("the number of vertices", x.size(1));
  check_small("the number of rows", rows);
  check_small("the number of channels", channels);
  check_small("the number of entries", columns.numel());

  Tensor out = new_empty<3>(x, {batch, rows, channels});
  if (out.numel() == 0) return out;
  const OnDeviceOf on(x);
  const auto run = [&](auto zero, auto value) {
    using S = decltype(zero);
    using V = decltype(value);
    const MeshPoolArguments<S, V> arguments{pointer<S>(x),
                                            pointer<int32_t>(row_pointers),
                                            pointer<int32_t>(columns),
                                            pointer<V>(values),
                                            mutable_pointer<S>(out),
                                            batch,
                                            rows,
                                            channels,
                                            static_cast<int>(x.size(1)),
                                            static_cast<int>(columns.numel())};
    mesh_pool_launch(arguments, on.device());
  };
  dispatch_floating<bfloat16, half>(type, [&](auto zero) {
    if (wide) {
      run(zero, double{});
    } else {
      run(zero, float{});
    }
  });
  return out;
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CUDA, m) { m.impl("mesh_pool", TORCH_BOX(&pahm::mesh_pool)); }
