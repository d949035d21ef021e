// Scales coordinates of any finite size to a size at which squares and cubes neither overflow nor vanish.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "mesh/topology.h"

namespace pahm::mesh {

// Multiplies by the power of two that brings the longest side of the points' bounding box into [0.5, 1], and
// moves an axis on which all points agree to 0. Points are finite. Both steps are exact: differences between
// the points keep their bits.
class Scaling {
 public:
  explicit Scaling(const std::vector<Vec3>& points) {
    if (points.empty()) return;
    Vec3 low = points[0], high = points[0];
    for (const Vec3& p : points) {
      for (int k = 0; k < 3; ++k) {
        low[k] = std::min(low[k], p[k]);
        high[k] = std::max(high[k], p[k]);
      }
    }
    double side = 0;
    for (int k = 0; k < 3; ++k) {
      side = std::max(side, high[k] - low[k]);
      if (high[k] == low[k]) offset_[k] = low[k];
    }
    std::frexp(std::min(side, std::numeric_limits<double>::max()), &exponent_);
  }

  // Takes any finite point. If a point is so far away that the whole mesh is at the same distance, to the
  // precision of a double, it is moved closer, to a box at which this still holds.
  Vec3 operator()(const Vec3& p) const {
    Vec3 out;
    for (int k = 0; k < 3; ++k) {
      const double whole = p[k] - offset_[k];
      const double scaled = std::isfinite(whole) ? std::ldexp(whole, -exponent_)
                                                 : std::ldexp(0.5 * p[k] - 0.5 * offset_[k], 1 - exponent_);
      out[k] = std::clamp(scaled, -far, far);
    }
    return out;
  }

  std::vector<Vec3> operator()(const std::vector<Vec3>& points) const {
    std::vector<Vec3> out(points.size());
    std::transform(points.begin(), points.end(), out.begin(), [this](const Vec3& p) { return (*this)(p); });
    return out;
  }

 private:
  static constexpr double far = 0x1p100;

  Vec3 offset_{};
  int exponent_ = 0;
};

}  // namespace pahm::mesh
