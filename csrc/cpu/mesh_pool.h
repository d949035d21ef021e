// Kernel of mesh_pool. Compiled once per instruction set (cpu/foreach_isa.h): no include, no guard.
namespace pahm::PAHM_ISA {

// `Vectors` vectors of channels of one output row; x and out point at the first of them.
template <int Vectors, typename S, typename V>
inline __attribute__((always_inline)) void mesh_pool_channels(const MeshPoolArguments<S, V>& a, const S* x,
                                                              S* out, int64_t first, int64_t last) {
  using T = Compute<S>;
  Vec<T> sum[Vectors] = {};
  for (int64_t e = first; e < last; ++e) {
    const Vec<T> value = broadcast(static_cast<T>(a.values[e]));
    const S* source = x + a.columns[e] * a.channels;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[v] += value * load(source + v * lanes<T>);
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) store(out + v * lanes<T>, sum[v]);
}

// Output rows begin to end of the flattened (B, M).
template <typename S, typename V>
void mesh_pool_rows(const MeshPoolArguments<S, V>& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int64_t width = lanes<T>, line = 64 / static_cast<int64_t>(sizeof(S));
  // Rows are read in no order that the hardware could guess. While a mesh is computed, the next one comes
  // into the second-level cache, if it fits there. A prefetch past the end does nothing.
  constexpr int64_t most_prefetched = (256 << 10) / static_cast<int64_t>(sizeof(S));
  const int64_t mesh_size = a.vertices * a.channels;
  const int64_t share = mesh_size <= most_prefetched ? (mesh_size + a.rows - 1) / a.rows : 0;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / a.rows, m = r % a.rows;
    const int64_t first = a.row_pointers[m], last = a.row_pointers[m + 1];
    const S* x = a.x + b * a.vertices * a.channels;
    S* out = a.out + r * a.channels;
    for (int64_t i = m * share; i < (m + 1) * share; i += line) __builtin_prefetch(x + mesh_size + i, 0, 2);
    int64_t c = 0;
    for (; c + 4 * width <= a.channels; c += 4 * width) mesh_pool_channels<4>(a, x + c, out + c, first, last);
    for (; c + width <= a.channels; c += width) mesh_pool_channels<1>(a, x + c, out + c, first, last);
    for (; c < a.channels; ++c) {
      T sum = 0;
      for (int64_t e = first; e < last; ++e) {
        sum += static_cast<T>(a.values[e]) * static_cast<T>(x[a.columns[e] * a.channels + c]);
      }
      out[c] = static_cast<S>(sum);
    }
  }
}

}  // namespace pahm::PAHM_ISA
