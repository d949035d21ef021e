// Float32 fused multiply-adds. Compiled once per instruction set (cpu/foreach_isa.h): no include, no guard.
namespace pahm::PAHM_ISA {

// Enough independent chains to hide the latency of two units with four cycles each.
inline constexpr int fma_chains = PAHM_VECTOR_REGISTERS == 32 ? 24 : 12;

// `rounds` times one fused multiply-add on every lane of every chain. Returns the number of operations and
// the result.
inline void fma_rounds(int64_t rounds, int64_t& operations, float& result) {
  using T = float;
  const Vec<T> factor = broadcast(T(0.999)), addend = broadcast(T(0.001));
  Vec<T> chain[fma_chains];
#pragma GCC unroll 24
  for (int i = 0; i < fma_chains; ++i) chain[i] = broadcast(T(i));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < fma_chains; ++i) chain[i] = chain[i] * factor + addend;
  }
  Vec<T> sum = chain[0];
  for (int i = 1; i < fma_chains; ++i) sum += chain[i];
  result = sum_lanes<T>(sum);
  operations = 2 * rounds * fma_chains * lanes<T>;
}

}  // namespace pahm::PAHM_ISA
