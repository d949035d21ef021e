// Activations on vectors. Compiled once per instruction set (cpu/foreach_isa.h): no include, no guard.
namespace pahm::PAHM_ISA {

// exp(x) in float: x = n ln 2 + r, a polynomial in r (Cephes' expf), and 2^n assembled from its bits.
inline __attribute__((always_inline)) Vec<float> exponential(Vec<float> x) {
  const Vec<float> low = broadcast(-87.3f), high = broadcast(88.3f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<float> n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 3 * 2^22 rounds
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec<int32_t> bits = (__builtin_convertvector(n, Vec<int32_t>) + 127) << 23;
  Vec<float> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// exp(x) - 1 for x <= 0. Near zero the difference would cancel, so the series is used.
inline __attribute__((always_inline)) Vec<float> exponential_minus_one(Vec<float> x) {
  Vec<float> s = x * (1.0f / 5040) + 1.0f / 720;
  s = s * x + 1.0f / 120;
  s = s * x + 1.0f / 24;
  s = s * x + 1.0f / 6;
  s = s * x + 0.5f;
  s = s * (x * x) + x;
  return x > -0.35f ? s : exponential(x) - 1.0f;
}

// x times the normal distribution's probability below x. The tail is formula 7.1.26 of Abramowitz and Stegun
// (to 1.5e-7).
inline __attribute__((always_inline)) Vec<float> gelu(Vec<float> x) {
  const Vec<float> z = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vec<float> t = 1.0f / (z * 0.3275911f + 1.0f);
  Vec<float> p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec<float> tail = p * t * exponential(-z * z);
  return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

// Double uses the library's functions, lane by lane.
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
inline Vec<double> exponential_minus_one(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::expm1(x[i]);
  return x;
}
inline Vec<double> gelu(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = 0.5 * x[i] * std::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

template <typename T>
inline __attribute__((always_inline)) Vec<T> clamp(Vec<T> x, Vec<T> low, Vec<T> high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <typename T>
inline __attribute__((always_inline)) Vec<T> activate(Vec<T> x, Activation kind) {
  const Vec<T> zero = {};
  switch (kind) {
    case Activation::relu:
      return x < zero ? zero : x;
    case Activation::elu:
      return x > zero ? x : exponential_minus_one(x > zero ? zero : x);
    case Activation::gelu:
      return gelu(x);
    case Activation::relu6:
      return clamp<T>(x, zero, zero + T(6));
    case Activation::silu:
      return x / (T(1) + exponential(-x));
    default:
      return x;
  }
}

}  // namespace pahm::PAHM_ISA
