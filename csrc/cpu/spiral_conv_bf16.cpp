// spiral_conv and its gradients in bfloat16, with the products of x86-64 CPUs. spiral_conv.cpp checks the
// arguments and calls these.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/spiral_conv_shared.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace pahm {

struct SpiralForwardBf16 {
  SpiralShape shape;
  const c10::BFloat16* x;       // (B, N, C)
  const int32_t* table;         // (L, M)
  const c10::BFloat16* packed;  // (panels, L, depth / 2, 32, 2)
  const float* bias;            // (Cout), or null
  c10::BFloat16* out;           // (B, M, Cout)
  Activation activation;
  int64_t depth;  // input channels, padded
  int64_t group;  // blocks of rows gathered at a time
};

struct SpiralInputGradBf16 {
  SpiralShape shape;
  const c10::BFloat16* grad;    // (B, M, Cout)
  const int32_t* table;         // (L, M)
  const c10::BFloat16* packed;  // (panels, L, depth / 2, 32, 2)
  c10::BFloat16* out;           // (B, N, C)
  int64_t depth;                // output channels, padded
};

struct SpiralWeightGradBf16 {
  SpiralShape shape;
  const c10::BFloat16* grad;  // (B, M, Cout)
  const c10::BFloat16* x;     // (B, N, C)
  const int32_t* table;       // (L, M)
  c10::BFloat16* out;         // (Cout, L * C)
};

}  // namespace pahm

#define PAHM_ISA isa_bf16
#define PAHM_VECTOR_BYTES 64
#define PAHM_VECTOR_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
// clang-format off
#include "cpu/simd.h"
#include "cpu/activation.h"
#include "cpu/transpose.h"
#include "cpu/bf16_product.h"
#include "cpu/spiral_conv_bf16.h"
// clang-format on
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pahm {
namespace {

using c10::BFloat16;
using isa_bf16::Unit;

constexpr int64_t step = isa_bf16::depth_step, block = isa_bf16::block_rows;

// The most bytes for the rows gathered at a time.
constexpr int64_t cache_bytes = 1 << 19;

int64_t padded(int64_t channels) { return ceil_div(channels, step) * step; }

}  // namespace

bool multiplies_bf16(Isa isa, const SpiralShape& shape) {
  if (shape.channels == 0) return false;
  return isa == Isa::amx || (isa == Isa::avx512_bf16 && shape.out_channels > 4);
}

void spiral_conv_bf16(Isa isa, const SpiralShape& shape, const BFloat16* x, const int32_t* table,
                      const BFloat16* weight, const float* bias, Activation activation, BFloat16* out) {
  const int64_t depth = padded(shape.channels), panels = ceil_div(shape.out_channels, block);
  const int64_t row_bytes = shape.length * depth * static_cast<int64_t>(sizeof(BFloat16));
  const Scratch<BFloat16> packed(panels * shape.length * depth * block);
  const SpiralForwardBf16 arguments{
      shape,        x,     table,
      packed.get(), bias,  out,
      activation,   depth, std::clamp<int64_t>(cache_bytes / (block * row_bytes), 1, 4)};
  parallel_for(panels * shape.length, depth * block, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      isa_bf16::pack_forward(arguments, weight, packed.get(), i / shape.length, i % shape.length);
    }
  });
  const int64_t blocks = ceil_div(shape.batch * shape.rows, block);
  parallel_for(blocks, shape.length * depth * block * panels, [&](int64_t begin, int64_t end) {
    if (isa == Isa::amx) {
      isa_bf16::spiral_forward_bf16<Unit::tiles>(arguments, begin, end);
    } else {
      isa_bf16::spiral_forward_bf16<Unit::vectors>(arguments, begin, end);
    }
  });
}

void spiral_conv_input_grad_bf16(Isa isa, const SpiralShape& shape, const BFloat16* grad,
                                 const int32_t* table, const BFloat16* weight, BFloat16* out) {
  const int64_t depth = padded(shape.out_channels), panels = ceil_div(shape.channels, block);
  const Scratch<BFloat16> packed(panels * shape.length * depth * block);
  const SpiralInputGradBf16 arguments{shape, grad, table, packed.get(), out, depth};
  parallel_for(panels * shape.length, depth * block, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      isa_bf16::pack_input_grad(arguments, weight, packed.get(), i / shape.length, i % shape.length);
    }
  });
  parallel_for(shape.batch * panels, shape.rows * shape.length * depth, [&](int64_t begin, int64_t end) {
    if (isa == Isa::amx) {
      isa_bf16::spiral_input_grad_bf16<Unit::tiles>(arguments, begin, end);
    } else {
      isa_bf16::spiral_input_grad_bf16<Unit::vectors>(arguments, begin, end);
    }
  });
}

void spiral_conv_weight_grad_bf16(Isa isa, const SpiralShape& shape, const BFloat16* grad, const BFloat16* x,
                                  const int32_t* table, BFloat16* out) {
  const SpiralWeightGradBf16 arguments{shape, grad, x, table, out};
  const int64_t items = shape.length * ceil_div(shape.channels, block);
  parallel_for(items, shape.batch * shape.rows * shape.out_channels, [&](int64_t begin, int64_t end) {
    if (isa == Isa::amx) {
      isa_bf16::spiral_weight_grad_bf16<Unit::tiles>(arguments, begin, end);
    } else {
      isa_bf16::spiral_weight_grad_bf16<Unit::vectors>(arguments, begin, end);
    }
  });
}

}  // namespace pahm

#else

namespace pahm {

bool multiplies_bf16(Isa, const SpiralShape&) { return false; }
void spiral_conv_bf16(Isa, const SpiralShape&, const c10::BFloat16*, const int32_t*, const c10::BFloat16*,
                      const float*, Activation, c10::BFloat16*) {}
void spiral_conv_input_grad_bf16(Isa, const SpiralShape&, const c10::BFloat16*, const int32_t*,
                                 const c10::BFloat16*, c10::BFloat16*) {}
void spiral_conv_weight_grad_bf16(Isa, const SpiralShape&, const c10::BFloat16*, const c10::BFloat16*,
                                  const int32_t*, c10::BFloat16*) {}

}  // namespace pahm

#endif
