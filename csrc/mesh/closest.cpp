#include "mesh/closest.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "mesh/vec3.h"

namespace pahm::mesh {
namespace {

using Weights = std::array<double, 3>;

// The squared sine of the angle below which a triangle's normal is too uncertain to tell inside from outside.
constexpr double sliver = 1e-8;
// The squared area, in a mesh of size 1, below which products of coordinates may vanish.
constexpr double tiny = 1e-280;

double squared_distance_at(const Vec3& p, const Vec3& a, const Vec3& b, const Vec3& c, const Weights& w) {
  const Vec3 d = w[0] * (a - p) + w[1] * (b - p) + w[2] * (c - p);
  return dot(d, d);
}

// The position on the segment from a to b, in [0, 1], of the point nearest to p.
double along(const Vec3& p, const Vec3& a, const Vec3& b) {
  const Vec3 ab = b - a;
  const double length = dot(ab, ab);
  return length > 0 ? std::clamp(dot(p - a, ab) / length, 0.0, 1.0) : 0.0;
}

double squared_distance_to_box(const Vec3& p, const Vec3& low, const Vec3& high) {
  double sum = 0;
  for (int k = 0; k < 3; ++k) {
    const double d = std::max({low[k] - p[k], p[k] - high[k], 0.0});
    sum += d * d;
  }
  return sum;
}

}  // namespace

SurfacePoint SurfaceTree::closest_on_face(Index face, const Vec3& p) const {
  // Inside the prism over the triangle the projection is nearest; elsewhere a point of the border is.
  const Vec3 &a = points_[faces_[face][0]], &b = points_[faces_[face][1]], &c = points_[faces_[face][2]];
  const Vec3 ab = b - a, ac = c - a, ap = p - a;
  const Vec3 normal = cross(ab, ac);
  const double area = dot(normal, normal);
  SurfacePoint best{face, {1, 0, 0}, dot(ap, ap)};
  if (area > 0) {
    const double wb = dot(cross(ap, ac), normal) / area;
    const double wc = dot(cross(ab, ap), normal) / area;
    if (wb >= 0 && wc >= 0 && wb + wc <= 1) {
      const Weights w{1 - (wb + wc), wb, wc};
      best = {face, w, squared_distance_at(p, a, b, c, w)};
      if (area > std::max(tiny, sliver * dot(ab, ab) * dot(ac, ac))) return best;
    }
  }
  const Vec3* corner[] = {&a, &b, &c};
  for (int k = 0; k < 3; ++k) {
    const int next = (k + 1) % 3;
    const double t = along(p, *corner[k], *corner[next]);
    Weights w{};
    w[k] = 1 - t;
    w[next] = t;
    const double distance = squared_distance_at(p, a, b, c, w);
    if (distance < best.squared_distance) best = {face, w, distance};
  }
  return best;
}

SurfaceTree::SurfaceTree(const std::vector<Vec3>& points, const std::vector<Face>& faces)
    : scaling_(points), points_(scaling_(points)), faces_(faces), order_(faces.size()) {
  std::iota(order_.begin(), order_.end(), 0);
  std::vector<Vec3> centers(faces.size());
  for (size_t f = 0; f < faces.size(); ++f) {
    centers[f] = points_[faces[f][0]] + points_[faces[f][1]] + points_[faces[f][2]];
  }
  size_t nodes = 1;
  for (size_t size = faces.size(); size > leaf_size; size = (size + 1) / 2) nodes = 2 * nodes + 1;
  boxes_.resize(nodes);
  build(0, 0, faces.size(), centers);
}

void SurfaceTree::build(size_t node, size_t first, size_t last, const std::vector<Vec3>& centers) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  Box box{{inf, inf, inf}, {-inf, -inf, -inf}};
  for (size_t i = first; i < last; ++i) {
    for (Index v : faces_[order_[i]]) {
      for (int k = 0; k < 3; ++k) {
        box.low[k] = std::min(box.low[k], points_[v][k]);
        box.high[k] = std::max(box.high[k], points_[v][k]);
      }
    }
  }
  boxes_[node] = box;
  if (last - first <= leaf_size) return;
  int axis = 0;
  for (int k = 1; k < 3; ++k) {
    if (box.high[k] - box.low[k] > box.high[axis] - box.low[axis]) axis = k;
  }
  const size_t middle = first + (last - first) / 2;
  std::nth_element(
      order_.begin() + first, order_.begin() + middle, order_.begin() + last, [&](Index a, Index b) {
        return centers[a][axis] != centers[b][axis] ? centers[a][axis] < centers[b][axis] : a < b;
      });
  build(2 * node + 1, first, middle, centers);
  build(2 * node + 2, middle, last, centers);
}

void SurfaceTree::visit(size_t node, size_t first, size_t last, const Vec3& p, SurfacePoint& best) const {
  if (last - first <= leaf_size) {
    for (size_t i = first; i < last; ++i) {
      const SurfacePoint found = closest_on_face(order_[i], p);
      if (found.squared_distance < best.squared_distance ||
          (found.squared_distance == best.squared_distance && found.face < best.face)) {
        best = found;
      }
    }
    return;
  }
  const size_t middle = first + (last - first) / 2;
  const Box &left = boxes_[2 * node + 1], &right = boxes_[2 * node + 2];
  const double to_left = squared_distance_to_box(p, left.low, left.high);
  const double to_right = squared_distance_to_box(p, right.low, right.high);
  const bool left_first = to_left <= to_right;
  for (const bool go_left : {left_first, !left_first}) {
    if ((go_left ? to_left : to_right) > best.squared_distance) continue;
    visit(2 * node + (go_left ? 1 : 2), go_left ? first : middle, go_left ? middle : last, p, best);
  }
}

SurfacePoint SurfaceTree::closest(const Vec3& p) const {
  const Vec3 scaled = scaling_(p);
  SurfacePoint best = closest_on_face(order_[0], scaled);
  visit(0, 0, faces_.size(), scaled, best);
  return best;
}

}  // namespace pahm::mesh
