// Maps (B, C, H, W) in channels_last: the channels of a pixel are adjacent.
#pragma once

#include "cpu/operands.h"

namespace pahm {

inline void check_map(const Tensor& t, const char* name) {
  check_cpu(t, name);
  const auto last = [&] {
    int64_t expected = 1;
    for (const int64_t d : {1, 3, 2, 0}) {
      if (t.size(d) != 1 && t.stride(d) != expected) return false;
      expected = product(expected, t.size(d));
    }
    return true;
  };
  check(t.dim() == 4 && t.scalar_type() == ScalarType::Float && (t.numel() == 0 || last()),
        [&] { return std::string(name) + " must be (B, C, H, W) in channels_last and float32"; });
}

// An uninitialised map in channels_last.
inline Tensor new_empty_map(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const int64_t row = product(width, channels), item = product(height, row);
  product(batch, item);
  const std::array<int64_t, 4> sizes{batch, channels, height, width}, strides{item, 1, row, channels};
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(ScalarType::Float));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace pahm
