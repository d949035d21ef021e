// Products of bfloat16 with vectors or tiles. Compiled once, by peak.cpp.
namespace pahm::PAHM_ISA {

// `rounds` times four products of 16 rows by 16 columns that wait for nothing. This rate is the ceiling for
// block_product. Returns the number of operations.
template <Unit U>
inline int64_t block_rounds(int64_t rounds, float* c) {
  [[maybe_unused]] const Setup<U> setup;
  if constexpr (U == Unit::tiles) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t r = 0; r < rounds; ++r) {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c, 64);
    return rounds * 4 * 2 * 16 * 16 * depth_step;
  } else {
    constexpr int chains = 24;
    __m512 sum[chains] = {};
    auto factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(rounds & 1));
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
      for (int i = 0; i < chains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], factor, factor);
    }
    for (int i = 1; i < chains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    _mm512_storeu_ps(c, sum[0]);
    return rounds * chains * 2 * 32;
  }
}

}  // namespace pahm::PAHM_ISA
