#include "check.h"

#include "cpu/mesh_pool.cpp"

namespace {

template <typename S>
using ComputeType = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename S>
void check_mesh_pool(int64_t batch, int64_t vertices, int64_t rows, int64_t channels) {
  using T = ComputeType<S>;
  const auto x = random_numbers<S>(batch * vertices * channels);
  const auto values = random_numbers<T>(3 * rows);
  const auto columns = random_indices(3 * rows, vertices);
  std::vector<int32_t> pointers;
  for (int32_t r = 0; r <= rows; ++r) pointers.push_back(3 * r);
  std::vector<S> out(static_cast<size_t>(batch * rows * channels));
  std::vector<double> wanted(out.size());
  for (int64_t r = 0; r < batch * rows; ++r) {
    for (int64_t e = 3 * (r % rows); e < 3 * (r % rows) + 3; ++e) {
      for (int64_t c = 0; c < channels; ++c) {
        wanted[r * channels + c] +=
            values[e] * static_cast<double>(x[(r / rows * vertices + columns[e]) * channels + c]);
      }
    }
  }
  const pahm::MeshPoolArguments<S, T> arguments{x.data(),   pointers.data(), columns.data(), values.data(),
                                                out.data(), vertices,        rows,           channels};
  pahm::isa_baseline::mesh_pool_rows(arguments, 0, batch * rows);
  check_close("mesh_pool", out, wanted);
}

}  // namespace

int main() {
  return run([](auto zero) {
    using S = decltype(zero);
    check_mesh_pool<S>(3, 20, 31, 37);
  });
}
