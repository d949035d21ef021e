// Loops over torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace pahm {

// Runs f(begin, end) over pieces of [0, count), with about `work` operations per item. No piece is so small
// that starting a thread for it costs more. The pieces depend on the number of threads, so an item's result
// must not depend on which others share its piece.
template <typename F>
void parallel_for(int64_t count, int64_t work, const F& f) {
  constexpr int64_t least_work = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, least_work / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace pahm
