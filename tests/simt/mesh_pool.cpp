// mesh_pool's kernel on the CPU, for tests/simt/test_mesh_pool.py.
#include "kernels/mesh_pool.cuh"

#include "run.h"

extern "C" const char* mesh_pool(int dtype, int wide_values, const void* x, const int32_t* row_pointers,
                                 const int32_t* columns, const void* values, void* out, int64_t batch,
                                 int vertices, int64_t rows, int64_t channels, int entries, int processors,
                                 uint64_t seed, simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      const auto launch = [&](auto value) {
        using V = decltype(value);
        const pahm::MeshPoolArguments<S, V> arguments{static_cast<const S*>(x),
                                                      row_pointers,
                                                      columns,
                                                      static_cast<const V*>(values),
                                                      static_cast<S*>(out),
                                                      batch,
                                                      rows,
                                                      channels,
                                                      vertices,
                                                      entries};
        pahm::mesh_pool_launch(arguments, device(seed, processors));
      };
      if (wide_values) {
        launch(double{});
      } else {
        launch(float{});
      }
    });
  });
}
PAHM_CASE(mesh_pool);
