// Sums of squared distances to planes and points.
#pragma once

#include "mesh/vec3.h"

namespace pahm::mesh {

// The function x -> x'Ax + 2b'x + c, A symmetric (xx, xy, xz, yy, yz, zz).
struct Quadric {
  std::array<double, 6> a{};
  Vec3 b{};
  double c = 0;

  // Adds weight times the squared distance to the plane through p with the unit normal n.
  void add_plane(const Vec3& p, const Vec3& n, double weight) {
    const double d = -dot(p, n);
    add({n[0] * n[0], n[0] * n[1], n[0] * n[2], n[1] * n[1], n[1] * n[2], n[2] * n[2]}, d * n, d * d, weight);
  }

  // Adds weight times the squared distance to p.
  void add_point(const Vec3& p, double weight) { add({1, 0, 0, 1, 0, 1}, -1.0 * p, dot(p, p), weight); }

  void operator+=(const Quadric& q) { add(q.a, q.b, q.c, 1); }

  double at(const Vec3& x) const {
    return a[0] * x[0] * x[0] + a[3] * x[1] * x[1] + a[5] * x[2] * x[2] +
           2 * (a[1] * x[0] * x[1] + a[2] * x[0] * x[2] + a[4] * x[1] * x[2] + dot(b, x)) + c;
  }

 private:
  void add(const std::array<double, 6>& matrix, const Vec3& vector, double constant, double weight) {
    for (int k = 0; k < 6; ++k) a[k] += weight * matrix[k];
    for (int k = 0; k < 3; ++k) b[k] += weight * vector[k];
    c += weight * constant;
  }
};

}  // namespace pahm::mesh
