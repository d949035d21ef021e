// Arguments of every kind, and faults that only sanitizers see, for tests/simt/test_simt_kernels.py.
#include <array>
#include <vector>

#include "kernel_case.h"

namespace {

using pahm::load;
using pahm::store;

// Reverses a block by way of shared memory.
__global__ void reverse(const float* in, float* out, bool barrier) {
  PAHM_SHARED(float, tile, threads);
  const int i = threadIdx.x;
  tile[i] = load(in + i);
  if (barrier) __syncthreads();
  store(out + i, static_cast<float>(tile[threads - 1 - i]));
}
KERNEL(reverse);

// An array of a thread's own, and arithmetic.
__global__ void own_array(float* out, int index) {
  std::array<int, 400> own;
  volatile int* const p = own.data();
  for (int i = 0; i < 400; ++i) p[i] = i;
  store(out + threadIdx.x, static_cast<float>(p[index]));
}
KERNEL(own_array);

__global__ void arithmetic(int32_t* out, int32_t a) { store(out + threadIdx.x, a + 1); }
KERNEL(arithmetic);

}  // namespace

// A tensor that the host reads too far.
extern "C" const char* host_sum(const int32_t* in, int count, int32_t* out, uint64_t, simt::Counts* counts) {
  return run(counts, [&] {
    *out = 0;
    for (int i = 0; i < count; ++i) *out += in[i];
  });
}
PAHM_CASE(host_sum);

// Runs kernels to the end after another was given up in the middle.
extern "C" const char* after_failures(const float* in, float* out, uint64_t seed, simt::Counts* counts) {
  for (uint64_t i = 0; i < 20; ++i) {
    if (!Launch<&reverse>::call(1, 0, 1, in, out, false, seed + i, counts)) return "no failure";
    if (const char* complaint = Launch<&own_array>::call(1, 0, 1, out, 0, seed, counts)) return complaint;
  }
  return Launch<&reverse>::call(1, 0, 1, in, out, true, seed, counts);
}
PAHM_CASE(after_failures);

// Gives back what it got: every kind of argument.
extern "C" const char* echo(bool yes, int small, int64_t large, double real, const void* const* tensors,
                            const int64_t* integers, const double* reals, const float* none, double* out,
                            uint64_t seed, simt::Counts* counts) {
  return run(counts, [&] {
    const std::vector<double> found{static_cast<double>(yes),
                                    static_cast<double>(small),
                                    static_cast<double>(large),
                                    real,
                                    *static_cast<const float*>(tensors[0]),
                                    tensors[1] ? 1.0 : 0.0,
                                    static_cast<double>(integers[1]),
                                    reals[1],
                                    none ? 1.0 : 0.0,
                                    static_cast<double>(seed)};
    for (size_t i = 0; i < found.size(); ++i) out[i] = found[i];
  });
}
PAHM_CASE(echo);
