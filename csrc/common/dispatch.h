// From a tensor's dtype to a C++ type: float, double or bfloat16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <stdexcept>

#include "common/checks.h"

namespace pahm {

// Calls f with a value-initialised float, double or c10::BFloat16.
template <typename F>
void dispatch_floating(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      throw std::invalid_argument("the CPU kernels take float32, float64 and bfloat16");
  }
}

// What a dtype is computed in: bfloat16 in float32.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::BFloat16 ? ScalarType::Float : type;
}

}  // namespace pahm
