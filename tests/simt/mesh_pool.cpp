// mesh_pool's kernel on the CPU, for tests/test_simt.py.
#include "kernels/mesh_pool.cuh"

#include "run.h"

namespace {

template <typename S, int Count>
void launch(const void* x, const int32_t* row_pointers, const int32_t* columns, const void* values, void* out,
            const int64_t* sizes, int blocks, uint64_t seed) {
  using T = pahm::Sum<S>;
  simt::Machine::get().launch(blocks, pahm::mesh_pool_threads, seed, [&] {
    pahm::mesh_pool_kernel<S, Count>(static_cast<const S*>(x), row_pointers, columns,
                                     static_cast<const T*>(values), static_cast<S*>(out), sizes[0], sizes[1],
                                     sizes[2], sizes[3]);
  });
}

}  // namespace

// sizes: batch, vertices, rows, channels. `together` channels are moved at a time: 16 bytes of them, or 1.
extern "C" const char* mesh_pool(int dtype, int together, const void* x, const int32_t* row_pointers,
                                 const int32_t* columns, const void* values, void* out, const int64_t* sizes,
                                 int blocks, uint64_t seed, simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      if (together == 1) {
        launch<S, 1>(x, row_pointers, columns, values, out, sizes, blocks, seed);
      } else {
        launch<S, 16 / sizeof(S)>(x, row_pointers, columns, values, out, sizes, blocks, seed);
      }
    });
  });
}
