// Needs neither torch nor CUDA, so device code can use it too.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PAHM_HOST_DEVICE __host__ __device__
#else
#define PAHM_HOST_DEVICE
#endif

namespace pahm {

// a / b rounded up, for a >= 0 and b > 0.
PAHM_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace pahm
