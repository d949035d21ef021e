// What the float32 and float64 kernels of spiral_conv and those of bfloat16 have in common.
#pragma once

#include <cstdint>

namespace pahm {

// x (batch, vertices, channels), indices (rows, length) -> (batch, rows, out_channels).
struct SpiralShape {
  int64_t batch, vertices, rows, length, channels, out_channels;
};

// Numbers as the op takes them.
enum class Activation : int64_t { none = 0, relu = 1, elu = 2, gelu = 3 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace pahm
