// The instruction set that the CPU kernels of this process use, chosen at run time.
#pragma once

namespace pahm {

// In rising order on each architecture. The last two are AVX-512 with products of bfloat16 numbers, on
// vectors and on tiles; kernels that have no use for these are the same as for avx512.
enum class Isa : int { plain = 0, neon = 1, avx2 = 2, avx512 = 3, avx512_bf16 = 4, amx = 5 };

// The best set this CPU has, or the one that the environment variable PAHM_CPU_ISA names. Read anew at each
// call. Throws std::invalid_argument if the variable names a set that does not exist or that this CPU lacks.
Isa active_isa();

}  // namespace pahm

// Calls FUNCTION as it was compiled for the instruction set ISA (see foreach_isa.h).
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
#define PAHM_ISA_CALL_AS(ISA, FUNCTION, ...) \
  static_cast<void>(ISA);                    \
  ::pahm::isa_baseline::FUNCTION(__VA_ARGS__)
#endif

// The same for the active one.
#define PAHM_ISA_CALL(FUNCTION, ...) PAHM_ISA_CALL_AS(::pahm::active_isa(), FUNCTION, __VA_ARGS__)
