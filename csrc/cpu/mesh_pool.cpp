// mesh_pool: x (B, N, C), a CSR matrix (M, N) -> (B, M, C). Its gradient is the same op with the matrix and
// its transpose exchanged; that is why the op is given both.
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace pahm {

template <typename S>
struct MeshPoolArguments {
  const S* x;
  const int64_t* row_pointers;
  const int64_t* columns;
  const std::conditional_t<std::is_same_v<S, double>, double, float>* values;
  S* out;
  int64_t vertices, rows, channels;
};

}  // namespace pahm

#define PAHM_KERNEL_FILE "cpu/mesh_pool.h"
#include "common/foreach_isa.h"

namespace pahm {
namespace {

void check_row_pointers(const Tensor& pointers, int64_t entries) {
  const int64_t* p = pointers.const_data_ptr<int64_t>();
  const int64_t rows = pointers.numel() - 1;
  bool ordered = rows >= 0 && p[0] == 0 && p[rows] == entries;
  for (int64_t r = 0; r < rows; ++r) ordered &= p[r] <= p[r + 1];
  check(ordered, "row_pointers must rise from 0 to the number of entries");
}

Tensor mesh_pool(const Tensor& x_, const Tensor& row_pointers_, const Tensor& columns_, const Tensor& values_,
                 const Tensor& t_row_pointers, const Tensor&, const Tensor&) {
  check_cpu(x_, "x");
  check_cpu(values_, "values");
  check(x_.dim() == 3, "x must be (B, N, C)");
  const Tensor row_pointers = index_table(row_pointers_, 1, "row_pointers");
  const Tensor columns = index_table(columns_, 1, "columns");
  check(values_.dim() == 1 && values_.numel() == columns.numel(),
        "values must have one number a column index");
  check_row_pointers(row_pointers, columns.numel());
  check_range(columns, x_.size(1), "columns");
  check(t_row_pointers.dim() == 1 && t_row_pointers.numel() == x_.size(1) + 1,
        "the transpose must be (N, M)");

  const Tensor x = as_contiguous(x_);
  const Tensor values = as_contiguous(of_type(values_, compute_type(x.scalar_type())));
  const int64_t batch = x.size(0), rows = row_pointers.numel() - 1, channels = x.size(2);
  Tensor out = torch::stable::new_empty(x, {batch, rows, channels});
  if (out.numel() == 0) return out;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(MeshPoolArguments<S>::values)>>;
    const MeshPoolArguments<S> arguments{x.const_data_ptr<S>(),
                                         row_pointers.const_data_ptr<int64_t>(),
                                         columns.const_data_ptr<int64_t>(),
                                         values.const_data_ptr<T>(),
                                         out.mutable_data_ptr<S>(),
                                         x.size(1),
                                         rows,
                                         channels};
    const Isa isa = active_isa();
    parallel_for(batch * rows, channels * (1 + columns.numel() / rows), [&](int64_t begin, int64_t end) {
      PAHM_ISA_CALL_AS(isa, mesh_pool_rows<S>, arguments, begin, end);
    });
  });
  return out;
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CPU, m) { m.impl("mesh_pool", TORCH_BOX(&pahm::mesh_pool)); }
