// Declarations that the files of spiral_conv share: its shape, and the bfloat16 kernels that the ops call.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "common/ceil_div.h"
#include "cpu/activation_kind.h"
#include "cpu/isa.h"

namespace pahm {

// x (batch, vertices, channels), table (length, rows) -> (batch, rows, out_channels).
struct SpiralShape {
  int64_t batch, vertices, rows, length, channels, out_channels;
};

// ---- for CPUs with bfloat16 products; tensors are contiguous and not empty, indices are in range ----

// Whether these handle a call. Without tiles, calls with few output channels go to the float32 kernels.
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
