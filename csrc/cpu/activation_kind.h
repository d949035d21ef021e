// The activations that a kernel can apply to its result.
#pragma once

#include <cstdint>

namespace pahm {

// The numbers that ops take: spiral_conv knows those up to gelu, a frozen network all of them.
enum class Activation : int64_t { none = 0, relu = 1, elu = 2, gelu = 3, relu6 = 4, silu = 5 };

}  // namespace pahm
