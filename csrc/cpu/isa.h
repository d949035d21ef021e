// The instruction set that the CPU kernels of this process use, chosen at run time.
#pragma once

namespace pahm {

// In ascending order on each architecture. The last two are AVX-512 with bfloat16 products, on vectors and on
// tiles; kernels without such products are the same as for avx512.
enum class Isa : int { plain = 0, neon = 1, avx2 = 2, avx512 = 3, avx512_bf16 = 4, amx = 5 };

// The best set of this CPU, or the one that the environment variable PAHM_CPU_ISA names. Each call reads the
// variable again. Throws std::invalid_argument if it names a set that does not exist or that this CPU lacks.
Isa active_isa();

}  // namespace pahm

// Calls FUNCTION as compiled for the instruction set ISA (see foreach_isa.h).
#if defined(__x86_64__)
#define PAHM_ISA_CALL_AS(ISA, FUNCTION, ...)       \
  do {                                             \
    if ((ISA) >= ::pahm::Isa::avx512) {            \
      ::pahm::isa_avx512::FUNCTION(__VA_ARGS__);   \
    } else if ((ISA) == ::pahm::Isa::avx2) {       \
      ::pahm::isa_avx2::FUNCTION(__VA_ARGS__);     \
    } else {                                       \
      ::pahm::isa_baseline::FUNCTION(__VA_ARGS__); \
    }                                              \
  } while (false)
#else
#define PAHM_ISA_CALL_AS(ISA, FUNCTION, ...)     \
  do {                                           \
    static_cast<void>(ISA);                      \
    ::pahm::isa_baseline::FUNCTION(__VA_ARGS__); \
  } while (false)
#endif

// The same for the active instruction set.
#define PAHM_ISA_CALL(FUNCTION, ...) PAHM_ISA_CALL_AS(::pahm::active_isa(), FUNCTION, __VA_ARGS__)
