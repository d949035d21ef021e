// The register tile of all matrix products. Compiled once per instruction set (cpu/foreach_isa.h): no guard.
namespace pahm::PAHM_ISA {

// Rows of a tile: its 2 vectors per row and 3 more fill the register file.
inline constexpr int tile_rows = PAHM_VECTOR_REGISTERS == 32 ? 14 : 6;

template <typename T>
inline constexpr int64_t panel_width = 2 * lanes<T>;

// A panel's width in memory: the last vector is left out if no column needs it.
template <typename T>
inline int64_t stored_width(int64_t columns) {
  return columns > lanes<T> ? panel_width<T> : lanes<T>;
}

// acc += rows (MR pointers, K numbers each) times panel (K, NV vectors).
template <typename T, int MR, int NV>
inline __attribute__((always_inline)) void multiply(Vec<T> (&acc)[MR][NV], const T* const (&rows)[MR],
                                                    const T* panel, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> column[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) column[v] = load(panel + v * lanes<T>);
    panel += NV * lanes<T>;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec<T> scalar = broadcast(rows[i][k]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] += scalar * column[v];
    }
  }
}

}  // namespace pahm::PAHM_ISA
