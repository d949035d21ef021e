// mesh_pool: x (B, N, C), a CSR matrix (M, N) -> (B, M, C). Its gradient is the same with the transpose,
// which only the gradient uses.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"

namespace pahm {

template <typename S, typename V>
struct MeshPoolArguments {
  const S* x;                   // (B, vertices, channels)
  const int32_t* row_pointers;  // (rows + 1)
  const int32_t* columns;       // (entries)
  const V* values;              // (entries), float or double for any type of x
  S* out;                       // (B, rows, channels)
  int64_t vertices, rows, channels;
};

}  // namespace pahm

#define PAHM_KERNEL_FILE "cpu/mesh_pool.h"
#include "cpu/foreach_isa.h"

namespace pahm {
namespace {

void check_row_pointers(const Tensor& pointers, int64_t entries) {
  const int32_t* p = pointers.const_data_ptr<int32_t>();
  const int64_t rows = pointers.numel() - 1;
  bool ordered = rows >= 0 && p[0] == 0 && p[rows] == entries;
  for (int64_t r = 0; r < rows; ++r) ordered &= p[r] <= p[r + 1];
  check(ordered, "row_pointers must rise from 0 to the number of entries");
}

Tensor mesh_pool(const Tensor& x_, const Tensor& row_pointers_, const Tensor& columns_, const Tensor& values_,
                 const Tensor&, const Tensor&, const Tensor&) {
  check_cpu(x_, "x");
  check_cpu(values_, "values");
  check(x_.dim() == 3, "x must be (B, N, C)");
  const int64_t batch = x_.size(0), vertices = x_.size(1), channels = x_.size(2);
  const Tensor row_pointers = index_table(row_pointers_, 1, "row_pointers");
  const Tensor columns = index_table(columns_, 1, "columns");
  const int64_t entries = columns.numel(), rows = row_pointers.numel() - 1;
  check(values_.dim() == 1 && values_.numel() == entries, "values must have one number a column index");
  const bool wide = values_.scalar_type() == ScalarType::Double;
  check(wide || values_.scalar_type() == ScalarType::Float, "values must be float32 or float64");
  check_row_pointers(row_pointers, entries);
  check_range(columns, vertices, "columns");

  const ScalarType type = x_.scalar_type();
  Tensor out = new_empty<3>(x_, {batch, rows, channels}, type);
  if (product(product(batch, rows), channels) == 0) return out;
  const Tensor x = as_contiguous(x_), values = as_contiguous(values_);
  const auto run = [&]<typename S, typename V>(S, V) {
    const MeshPoolArguments<S, V> arguments{x.const_data_ptr<S>(),
                                            row_pointers.const_data_ptr<int32_t>(),
                                            columns.const_data_ptr<int32_t>(),
                                            values.const_data_ptr<V>(),
                                            out.mutable_data_ptr<S>(),
                                            vertices,
                                            rows,
                                            channels};
    const Isa isa = active_isa();
    parallel_for(batch * rows, channels * (1 + entries / rows), [&](int64_t begin, int64_t end) {
      PAHM_ISA_CALL_AS(isa, mesh_pool_rows, arguments, begin, end);
    });
  };
  dispatch_floating<c10::BFloat16>(type, [&](auto zero) { wide ? run(zero, double{}) : run(zero, float{}); });
  return out;
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CPU, m) { m.impl("mesh_pool", TORCH_BOX(&pahm::mesh_pool)); }
