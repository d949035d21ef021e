// What the files of spiral_conv share: its shape, and the kernels of bfloat16 as the ops call them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "common/isa.h"

namespace pahm {

// x (batch, vertices, channels), indices (rows, length) -> (batch, rows, out_channels).
struct SpiralShape {
  int64_t batch, vertices, rows, length, channels, out_channels;
};

// Numbers as the op takes them.
enum class Activation : int64_t { none = 0, relu = 1, elu = 2, gelu = 3 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- where the CPU multiplies bfloat16 itself: tensors contiguous and not empty, indices in range ----

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
