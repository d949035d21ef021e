// Compiler vectors of PAHM_VECTOR_BYTES: +, -, * work on them, and a * b + c becomes one fused instruction.
// foreach_isa.h includes this file once per instruction set, so it has no include guard.
namespace pahm::PAHM_ISA {

template <typename T, int Bytes = PAHM_VECTOR_BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};

// A register of T, which is float or double.
template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
inline constexpr int lanes = PAHM_VECTOR_BYTES / static_cast<int>(sizeof(T));

// The type in which memory of type S is computed: float for bfloat16.
template <typename S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<c10::BFloat16> {
  using type = float;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

template <typename T>
inline __attribute__((always_inline)) Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// Unaligned loads and stores of lanes<T> elements.
inline __attribute__((always_inline)) Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline __attribute__((always_inline)) Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline __attribute__((always_inline)) Vec<float> load(const c10::BFloat16* p) {
  typename VectorOf<uint16_t, PAHM_VECTOR_BYTES / 2>::type narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  const auto wide = __builtin_convertvector(narrow, Vec<uint32_t>) << 16;
  Vec<float> v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

inline __attribute__((always_inline)) void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline __attribute__((always_inline)) void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
// Rounds to nearest even; a NaN stays a NaN.
inline __attribute__((always_inline)) void store(c10::BFloat16* p, Vec<float> v) {
  Vec<uint32_t> bits;
  std::memcpy(&bits, &v, sizeof v);
  const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t> is_nan = reinterpret_cast<Vec<uint32_t>>(v != v);
  const Vec<uint32_t> chosen = (rounded & ~is_nan) | (is_nan & 0x7fc0u);
  const auto narrow =
      __builtin_convertvector(chosen, typename VectorOf<uint16_t, PAHM_VECTOR_BYTES / 2>::type);
  std::memcpy(p, &narrow, sizeof narrow);
}

// Only the first `count` lanes (0 <= count <= lanes); a load fills the others with zero.
template <typename S>
inline __attribute__((always_inline)) Vec<Compute<S>> load_first(const S* p, int64_t count) {
  alignas(PAHM_VECTOR_BYTES) S buffer[lanes<Compute<S>>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(S));
  return load(buffer);
}
template <typename S>
inline __attribute__((always_inline)) void store_first(S* p, Vec<Compute<S>> v, int64_t count) {
  alignas(PAHM_VECTOR_BYTES) S buffer[lanes<Compute<S>>];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(S));
}

// Only the first `count` lanes if there are fewer than a vector has.
inline __attribute__((always_inline)) Vec<float> load_upto(const float* p, int64_t count) {
  return count >= lanes<float> ? load(p) : load_first(p, count);
}
inline __attribute__((always_inline)) void store_upto(float* p, Vec<float> v, int64_t count) {
  if (count >= lanes<float>) {
    store(p, v);
  } else {
    store_first(p, v, count);
  }
}

// The sum of all lanes, in a fixed order: halves are added until one lane is left.
template <typename T, size_t... I>
inline __attribute__((always_inline)) T add_halves(Vec<T> v, std::index_sequence<I...>) {
  constexpr size_t n = lanes<T>;
  if constexpr (n > 8) v += __builtin_shufflevector(v, v, static_cast<int>((I + 8) % n)...);
  if constexpr (n > 4) v += __builtin_shufflevector(v, v, static_cast<int>((I + 4) % n)...);
  if constexpr (n > 2) v += __builtin_shufflevector(v, v, static_cast<int>((I + 2) % n)...);
  v += __builtin_shufflevector(v, v, static_cast<int>((I + 1) % n)...);
  return v[0];
}
template <typename T>
inline __attribute__((always_inline)) T sum_lanes(Vec<T> v) {
  return add_halves<T>(v, std::make_index_sequence<lanes<T>>{});
}

}  // namespace pahm::PAHM_ISA
