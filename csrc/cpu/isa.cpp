#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pahm {
namespace {

constexpr std::array<std::pair<const char*, Isa>, 6> names{{{"plain", Isa::plain},
                                                            {"neon", Isa::neon},
                                                            {"avx2", Isa::avx2},
                                                            {"avx512", Isa::avx512},
                                                            {"avx512_bf16", Isa::avx512_bf16},
                                                            {"amx", Isa::amx}}};

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  explicit Registers(uint32_t subleaf) { __get_cpuid_count(7, subleaf, &a, &b, &c, &d); }
};

// On Linux a process must request the tile registers.
bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr uint32_t tiles = 1u << 24, bf16 = 1u << 22;
  constexpr long request_permission = 0x1023, tile_data = 18;
  const uint32_t found = Registers(0).d;
  return (found & tiles) && (found & bf16) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

Isa widest() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    constexpr uint32_t bf16 = 1u << 5;
    if (!(Registers(1).a & bf16)) return Isa::avx512;
    return has_amx() ? Isa::amx : Isa::avx512_bf16;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::plain;
}

// Intel's vector units take four times as long for a bfloat16 product as for a float32 product, so float32 is
// faster; AMD's take the same time for both.
bool products_of_bf16_pay() { return __builtin_cpu_is("amd"); }

#else
Isa widest() {
#if defined(__aarch64__)
  return Isa::neon;
#else
  return Isa::plain;
#endif
}
bool products_of_bf16_pay() { return true; }
#endif

Isa widest_isa() {
  static const Isa found = widest();
  return found;
}

Isa best_isa() {
  static const Isa best =
      widest_isa() == Isa::avx512_bf16 && !products_of_bf16_pay() ? Isa::avx512 : widest_isa();
  return best;
}

bool has(Isa isa) {
#if defined(__x86_64__)
  return isa != Isa::neon && isa <= widest_isa();
#else
  return isa == widest_isa();
#endif
}

Isa named_isa(const std::string& given) {
  std::string known;
  for (const auto& [name, isa] : names) {
    if (given == name) return isa;
    known += known.empty() ? name : std::string(", ") + name;
  }
  throw std::invalid_argument("PAHM_CPU_ISA must be one of " + known + ", got '" + given + "'");
}

int64_t cpu_isa() { return static_cast<int64_t>(active_isa()); }

}  // namespace

Isa active_isa() {
  const char* name = std::getenv("PAHM_CPU_ISA");
  if (name == nullptr || *name == '\0') return best_isa();
  const Isa isa = named_isa(name);
  if (!has(isa)) {
    throw std::invalid_argument(std::string("PAHM_CPU_ISA asks for ") + name +
                                ", which this CPU does not have");
  }
  return isa;
}

}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&pahm::cpu_isa));
}
