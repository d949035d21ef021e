// spiral_conv's kernels on the CPU, for tests/simt/test_spiral_conv.py. `partial` is memory for split sums.
#include "kernels/spiral_conv.cuh"

#include "run.h"

namespace {

template <typename Product>
void product(const typename Product::Arguments& arguments, void* partial, int64_t bytes,
             const pahm::Device& device) {
  pahm::ProductPlan plan = pahm::plan_product<Product>(arguments, device.processors);
  if (pahm::partial_bytes<Product>(arguments, plan) > bytes)
    throw simt::Failure("too little memory for splits");
  plan.partial = partial;
  pahm::product_launch<Product>(arguments, plan, device);
}

}  // namespace

extern "C" const char* spiral_conv(int dtype, const void* x, const int32_t* table, const void* weight,
                                   const void* bias, int activation, void* out, void* partial,
                                   int64_t partial_bytes, int64_t batch, int vertices, int rows, int length,
                                   int channels, int out_channels, int processors, uint64_t seed,
                                   simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      const pahm::SpiralConvArguments<S> arguments{{batch, vertices, rows, length, channels, out_channels},
                                                   static_cast<const S*>(x),
                                                   table,
                                                   static_cast<const S*>(weight),
                                                   static_cast<const S*>(bias),
                                                   activation,
                                                   static_cast<S*>(out)};
      product<pahm::SpiralForward<S>>(arguments, partial, partial_bytes, device(seed, processors));
    });
  });
}
PAHM_CASE(spiral_conv);

extern "C" const char* spiral_conv_input_grad(int dtype, const void* grad, const int32_t* t_pointers,
                                              const int32_t* t_rows, const void* weight, void* out,
                                              void* partial, int64_t partial_bytes, int64_t batch,
                                              int vertices, int rows, int length, int channels,
                                              int out_channels, int processors, uint64_t seed,
                                              simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      const pahm::SpiralInputGradArguments<S> arguments{
          {batch, vertices, rows, length, channels, out_channels},
          static_cast<const S*>(grad),
          t_pointers,
          t_rows,
          static_cast<const S*>(weight),
          static_cast<S*>(out)};
      product<pahm::SpiralInputGrad<S>>(arguments, partial, partial_bytes, device(seed, processors));
    });
  });
}
PAHM_CASE(spiral_conv_input_grad);

extern "C" const char* spiral_conv_weight_grad(int dtype, const void* grad, const void* x,
                                               const int32_t* table, void* out, void* partial,
                                               int64_t partial_bytes, int64_t batch, int vertices, int rows,
                                               int length, int channels, int out_channels, int processors,
                                               uint64_t seed, simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      const pahm::SpiralWeightGradArguments<S> arguments{
          {batch, vertices, rows, length, channels, out_channels},
          static_cast<const S*>(grad),
          static_cast<const S*>(x),
          table,
          static_cast<S*>(out)};
      product<pahm::SpiralWeightGrad<S>>(arguments, partial, partial_bytes, device(seed, processors));
    });
  });
}
PAHM_CASE(spiral_conv_weight_grad);
