#include "common/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pahm {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("fma")) {
      return Isa::avx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::plain;
  }();
  return best;
#else
  return Isa::plain;
#endif
}

Isa named_isa(const std::string& name) {
  if (name == "avx512") return Isa::avx512;
  if (name == "avx2") return Isa::avx2;
  if (name == "plain") return Isa::plain;
  throw std::invalid_argument("PAHM_CPU_ISA must be avx512, avx2 or plain, got '" + name + "'");
}

int64_t cpu_isa() { return static_cast<int64_t>(active_isa()); }

}  // namespace

Isa active_isa() {
  const char* name = std::getenv("PAHM_CPU_ISA");
  if (name == nullptr || *name == '\0') return best_isa();
  const Isa isa = named_isa(name);
  if (isa > best_isa()) {
    throw std::invalid_argument(std::string("PAHM_CPU_ISA asks for ") + name +
                                ", which this CPU does not have");
  }
  return isa;
}

}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&pahm::cpu_isa));
}
