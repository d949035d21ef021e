// Maps a tensor's dtype to a C++ type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <type_traits>

namespace pahm {

using torch::headeronly::ScalarType;

// Calls f with a value-initialised float, double, BFloat16 or Half; pass void for a type without kernels.
template <typename BFloat16, typename Half = void, typename F>
void dispatch_floating(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      if constexpr (!std::is_void_v<Half>) return f(Half{});
      break;
    default:
      break;
  }
  throw std::invalid_argument("expected a tensor of float32, float64 or bfloat16, or on a GPU of float16");
}

// The type in which tensors of a dtype are computed: float32 for half precision.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace pahm
