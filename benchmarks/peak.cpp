// Only products of numbers in registers, on every thread. This rate is the ceiling for the CPU's kernels.
// peak.py compiles it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>

#include "cpu/isa.h"

#define PAHM_KERNEL_FILE "peak_fma.h"
#include "cpu/foreach_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PAHM_ISA isa_bf16
#define PAHM_VECTOR_BYTES 64
#define PAHM_VECTOR_REGISTERS 32
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#include "cpu/simd.h"
// Included here and not above, because it needs the vectors of simd.h.
#include "cpu/bf16_product.h"
#include "peak_bf16.h"
#pragma GCC pop_options
#endif

namespace {

using pahm::Isa;

// Returns the number of operations. `result` keeps the compiler from removing them.
int64_t products(Isa isa, bool bfloat16, int64_t rounds, float& result) {
#if defined(__x86_64__)
  using pahm::isa_bf16::Unit;
  if (bfloat16 && isa >= Isa::avx512_bf16) {
    alignas(64) float sums[1024];
    const int64_t operations = isa == Isa::amx ? pahm::isa_bf16::block_rounds<Unit::tiles>(rounds, sums)
                                               : pahm::isa_bf16::block_rounds<Unit::vectors>(rounds, sums);
    result = sums[0];
    return operations;
  }
#endif
  int64_t operations = 0;
  PAHM_ISA_CALL_AS(isa, fma_rounds, rounds, operations, result);
  return operations;
}

}  // namespace

// The operations of all threads, in float32, or in bfloat16 if the instruction set has bfloat16 products.
extern "C" int64_t peak(int isa, int threads, int64_t rounds, int bfloat16) {
  std::vector<int64_t> operations(static_cast<size_t>(threads));
  std::vector<float> results(static_cast<size_t>(threads));
  const auto run = [&](int i) {
    operations[i] = products(static_cast<Isa>(isa), bfloat16 != 0, rounds, results[i]);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
  int64_t sum = 0;
  for (int i = 0; i < threads; ++i) sum += std::isfinite(results[i]) ? operations[i] : 0;
  return sum;
}
