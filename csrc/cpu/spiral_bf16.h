// spiral_conv and its gradients where the CPU multiplies bfloat16 numbers itself. Tensors are contiguous and
// not empty, indices in range.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "common/isa.h"
#include "cpu/spiral_shape.h"

namespace pahm {

// Whether these serve a call. Few output channels are left to the float32 kernels where there are no tiles.
bool multiplies_bf16(Isa isa, const SpiralShape& shape);

// Nothing but products of bfloat16 in registers; returns their operations, 0 where `isa` has none.
int64_t multiply_bf16(Isa isa, int64_t rounds);

// x (B, N, C), indices (M, L), weight (Cout, L * C), bias (Cout,) or null -> out (B, M, Cout).
void spiral_conv_bf16(Isa isa, const SpiralShape& shape, const c10::BFloat16* x, const int64_t* indices,
                      const c10::BFloat16* weight, const float* bias, Activation activation,
                      c10::BFloat16* out);

// grad (B, M, Cout) -> out (B, N, C).
void spiral_conv_input_grad_bf16(Isa isa, const SpiralShape& shape, const c10::BFloat16* grad,
                                 const int64_t* indices, const c10::BFloat16* weight, c10::BFloat16* out);

// grad (B, M, Cout), x (B, N, C) -> out (Cout, L * C).
void spiral_conv_weight_grad_bf16(Isa isa, const SpiralShape& shape, const c10::BFloat16* grad,
                                  const c10::BFloat16* x, const int64_t* indices, c10::BFloat16* out);

}  // namespace pahm
