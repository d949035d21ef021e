// What the files of spiral_conv share: its shape, and the kernels of bfloat16 as the ops call them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "common/ceil_div.h"
#include "cpu/isa.h"

namespace pahm {

// x (batch, vertices, channels), table (length, rows) -> (batch, rows, out_channels).
struct SpiralShape {
  int64_t batch, vertices, rows, length, channels, out_channels;
};

// Numbers as the op takes them.
enum class Activation : int64_t { none = 0, relu = 1, elu = 2, gelu = 3 };

// ---- where the CPU multiplies bfloat16 itself: tensors contiguous and not empty, indices in range ----

// Whether these serve a call. Few output channels are left to the float32 kernels where there are no tiles.
bool multiplies_bf16(Isa isa, const SpiralShape& shape);

// x (B, N, C), table (L, M), weight (Cout, L * C), bias (Cout,) or null -> out (B, M, Cout).
void spiral_conv_bf16(Isa isa, const SpiralShape& shape, const c10::BFloat16* x, const int32_t* table,
                      const c10::BFloat16* weight, const float* bias, Activation activation,
                      c10::BFloat16* out);

// grad (B, M, Cout) -> out (B, N, C).
void spiral_conv_input_grad_bf16(Isa isa, const SpiralShape& shape, const c10::BFloat16* grad,
                                 const int32_t* table, const c10::BFloat16* weight, c10::BFloat16* out);

// grad (B, M, Cout), x (B, N, C) -> out (Cout, L * C).
void spiral_conv_weight_grad_bf16(Isa isa, const SpiralShape& shape, const c10::BFloat16* grad,
                                  const c10::BFloat16* x, const int32_t* table, c10::BFloat16* out);

}  // namespace pahm
