// Compiles one file of kernels for every instruction set of the architecture, each in its own namespace:
//
//   #define PAHM_KERNEL_FILE "cpu/some_op.h"
//   #include "cpu/foreach_isa.h"
//
// For each function f that the file defines inside `namespace pahm::PAHM_ISA { ... }` this makes
// pahm::isa_baseline::f (SSE2 on x86-64, NEON on aarch64), and on x86-64 also pahm::isa_avx2::f and
// pahm::isa_avx512::f. PAHM_ISA_CALL(f, arguments) calls the right one. The file has no include guard and may
// include only other files of its kind. Include what it needs from the standard library or from torch before
// this header, so that those inline functions keep the baseline instruction set. This header has no include
// guard either.

#include <cstdint>
#include <cstring>
#include <utility>

#include <torch/headeronly/util/BFloat16.h>

#define PAHM_ISA isa_baseline
#define PAHM_VECTOR_BYTES 16
#if defined(__aarch64__)
#define PAHM_VECTOR_REGISTERS 32
#else
#define PAHM_VECTOR_REGISTERS 16
#endif
#include "cpu/simd.h"
#include PAHM_KERNEL_FILE
#undef PAHM_ISA
#undef PAHM_VECTOR_BYTES
#undef PAHM_VECTOR_REGISTERS

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define PAHM_ISA isa_avx2
#define PAHM_VECTOR_BYTES 32
#define PAHM_VECTOR_REGISTERS 16
#include "cpu/simd.h"
#include PAHM_KERNEL_FILE
#undef PAHM_ISA
#undef PAHM_VECTOR_BYTES
#undef PAHM_VECTOR_REGISTERS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define PAHM_ISA isa_avx512
#define PAHM_VECTOR_BYTES 64
#define PAHM_VECTOR_REGISTERS 32
#include "cpu/simd.h"
#include PAHM_KERNEL_FILE
#undef PAHM_ISA
#undef PAHM_VECTOR_BYTES
#undef PAHM_VECTOR_REGISTERS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64
#undef PAHM_KERNEL_FILE
