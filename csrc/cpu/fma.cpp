// cpu_fma: nothing but fused multiply-adds in registers, on every thread: the rate that the kernels are held
// against. In float32, or in bfloat16 where the CPU multiplies that itself.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "cpu/spiral_conv_shared.h"

#define PAHM_KERNEL_FILE "cpu/fma.h"
#include "common/foreach_isa.h"

namespace pahm {
namespace {

int64_t cpu_fma(int64_t rounds, bool bfloat16) {
  check(rounds > 0, "rounds must be positive");
  const Isa isa = active_isa();
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<int64_t> operations(static_cast<size_t>(threads));
  std::vector<float> results(static_cast<size_t>(threads));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      operations[i] = bfloat16 ? multiply_bf16(isa, rounds) : 0;
      if (operations[i] == 0) PAHM_ISA_CALL_AS(isa, fma_rounds<float>, rounds, operations[i], results[i]);
    }
  });
  int64_t sum = 0;
  for (int64_t i = 0; i < threads; ++i) sum += results[i] < 1e9f ? operations[i] : 0;
  return sum;
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_fma", TORCH_BOX(&pahm::cpu_fma));
}
