// Each primitive of csrc/kernels/device.cuh as nvcc compiles it, alone in a kernel, for
// tests/csrc/test_cuda_primitives.py; and where a vertex lies on a map.
#include "kernels/vertex_sample.cuh"

using namespace pahm;

#define KERNEL extern "C" __global__ void

// ---- global memory ----

KERNEL load_16(Pack<float, 4>* out, const Pack<float, 4>* in) { store(out, load(in)); }
KERNEL load_16_halves(Pack<half, 8>* out, const Pack<half, 8>* in) { store(out, load(in)); }
KERNEL load_8(double* out, const double* in) { store(out, load(in)); }
KERNEL load_4(int32_t* out, const int32_t* in) { store(out, load(in)); }
KERNEL load_2(half* out, const half* in) { store(out, load(in)); }
KERNEL add_float(float* out, float value) { atomic_add(out, value); }
KERNEL add_double(double* out, double value) { atomic_add(out, value); }
KERNEL add_int(int* out, int value) { atomic_add(out, value); }

// ---- conversions ----

KERNEL widen_half(float* out, half value) { store(out, to_float(value)); }
KERNEL widen_bfloat16(float* out, bfloat16 value) { store(out, to_float(value)); }
KERNEL narrow_half(half* out, float value) { store(out, from_float<half>(value)); }
KERNEL narrow_bfloat16(bfloat16* out, float value) { store(out, from_float<bfloat16>(value)); }
KERNEL keep_float(float* out, float value) { store(out, from_float<float>(to_float(value))); }
KERNEL keep_double(double* out, double value) { store(out, from_float<double>(to_float(value))); }

KERNEL product_of_floats(float* out, float a, float b) { store(out, rounded_product(a, b) + a); }
KERNEL product_of_doubles(double* out, double a, double b) { store(out, rounded_product(a, b) + a); }

// ---- shared memory ----

KERNEL shared_16(float* out, int at) {
  PAHM_SHARED(float, array, 64);
  store_shared(array, 4 * at, Pack<float, 4>{{1, 2, 3, 4}});
  __syncthreads();
  store(out, load_shared<4>(array, 4 * at + 16).values[1]);
}
KERNEL shared_8(float* out, int at) {
  PAHM_DYNAMIC_SHARED(float, array);
  store_shared(array, 2 * at, Pack<float, 2>{{1, 2}});
  __syncthreads();
  store(out, load_shared<2>(array, 2 * at + 16).values[1]);
}
KERNEL shared_min(int at, int32_t value) {
  PAHM_SHARED(int32_t, array, 64);
  shared_atomic_min(array, at, value);
}
KERNEL shared_max(int at, int32_t value) {
  PAHM_SHARED(int32_t, array, 64);
  shared_atomic_max(array, at, value);
}

// ---- between the lanes of a warp ----

KERNEL shuffle_float(float* out, uint32_t mask, float value, int lane) {
  store(out, shuffle(mask, value, lane));
}
KERNEL shuffle_double(double* out, uint32_t mask, double value, int lane) {
  store(out, shuffle(mask, value, lane));
}
KERNEL shuffle_xor_float(float* out, uint32_t mask, float value, int lanes) {
  store(out, shuffle_xor(mask, value, lanes));
}
KERNEL ballot_of(uint32_t* out, uint32_t mask, int value) { store(out, ballot(mask, value > 5)); }
KERNEL barriers(uint32_t mask) {
  __syncthreads();
  __syncwarp(mask);
}

// ---- indices ----

KERNEL index_is(int* out, int32_t value, int count) { store(out, is_index(value, count) ? 7 : 9); }
KERNEL bound_is(int* out, int32_t value, int count) { store(out, list_bound(value, count)); }

// ---- a vertex on a map ----

template <typename S>
__device__ void locate_one(const SampleArguments<S>& a, const SampleMap<S>& map, Sum<S>* out) {
  Sum<S> vertex[3];
  load_vertex(a, blockIdx.x, threadIdx.x, vertex);
  Cell<Sum<S>> cell{};
  if (!locate(a, map, project(a, blockIdx.x, vertex), cell)) return;
  store(out, cell.fx);
  store(out + 1, cell.fy);
  store(out + 2, static_cast<Sum<S>>(cell.x));
  store(out + 3, static_cast<Sum<S>>(cell.y));
}
KERNEL located_float(const __grid_constant__ SampleArguments<float> a,
                     const __grid_constant__ SampleMap<float> map, float* out) {
  locate_one(a, map, out);
}
KERNEL located_double(const __grid_constant__ SampleArguments<double> a,
                      const __grid_constant__ SampleMap<double> map, double* out) {
  locate_one(a, map, out);
}
