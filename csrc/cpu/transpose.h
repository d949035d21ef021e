// Transposing matrices. Compiled once per instruction set (cpu/foreach_isa.h): no include, no guard.
namespace pahm::PAHM_ISA {

// Transposes one tile of lanes by lanes.
template <typename In, typename Out, size_t... K>
inline __attribute__((always_inline)) void transpose_tile(const In* in, int64_t in_stride, Out* out,
                                                          int64_t out_stride, std::index_sequence<K...>) {
  using T = Compute<In>;
  constexpr int n = lanes<T>;
  Vec<T> r[n];
  for (int j = 0; j < n; ++j) r[j] = load(in + j * in_stride);
  const auto stage = [&]<int W>(std::integral_constant<int, W>) __attribute__((always_inline)) {
    for (int i = 0; i < n; ++i) {
      if (i & W) continue;
      const Vec<T> a = r[i], b = r[i + W];
      r[i] = __builtin_shufflevector(a, b, ((K & W) ? static_cast<int>(K) - W + n : static_cast<int>(K))...);
      r[i + W] =
          __builtin_shufflevector(a, b, ((K & W) ? static_cast<int>(K) + n : static_cast<int>(K) + W)...);
    }
  };
  if constexpr (n > 8) stage(std::integral_constant<int, 8>{});
  if constexpr (n > 4) stage(std::integral_constant<int, 4>{});
  if constexpr (n > 2) stage(std::integral_constant<int, 2>{});
  stage(std::integral_constant<int, 1>{});
  for (int i = 0; i < n; ++i) store(out + i * out_stride, r[i]);
}

// out[i * out_stride + j] = in[j * in_stride + i] for i < width, j < height, converting between a type of
// memory and the type it is computed in.
template <typename In, typename Out>
void transpose(const In* in, int64_t in_stride, int64_t height, int64_t width, Out* out, int64_t out_stride) {
  constexpr int n = lanes<Compute<In>>;
  if (height < n || width < n) {
    for (int64_t j = 0; j < height; ++j) {
      for (int64_t i = 0; i < width; ++i) {
        // Pairs of bfloat16 come as floats. Copy their bytes, because there is no real float there.
        In from;
        std::memcpy(static_cast<void*>(&from), in + j * in_stride + i, sizeof from);
        const Out to = static_cast<Out>(from);
        std::memcpy(static_cast<void*>(out + i * out_stride + j), &to, sizeof to);
      }
    }
    return;
  }
  // The last tile of a row or a column overlaps the one before it.
  for (int64_t j = 0; j < height; j += n) {
    const int64_t y = std::min(j, height - n);
    for (int64_t i = 0; i < width; i += n) {
      const int64_t x = std::min(i, width - n);
      transpose_tile(in + y * in_stride + x, in_stride, out + x * out_stride + y, out_stride,
                     std::make_index_sequence<n>{});
    }
  }
}

}  // namespace pahm::PAHM_ISA
