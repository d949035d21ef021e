// Nearest points on a triangle mesh: a tree of axis-aligned boxes.
#pragma once

#include "topology.h"

namespace pahm::mesh {

struct SurfacePoint {
  Index face = -1;
  std::array<double, 3> weights{};  // barycentric, each in [0, 1], summing to 1
  double squared_distance = 0;
};

// The point of the triangle (a, b, c), degenerate or not, that is nearest to p; its face is left at -1.
SurfacePoint closest_on_triangle(const Vec3& p, const Vec3& a, const Vec3& b, const Vec3& c);

class SurfaceTree {
 public:
  // Keeps references to both; at least one face.
  SurfaceTree(const std::vector<Vec3>& points, const std::vector<Face>& faces);

  // Equal distances: the first face in file order.
  SurfacePoint closest(const Vec3& p) const;

 private:
  static constexpr std::size_t kLeaf = 4;

  struct Box {
    Vec3 low, high;
  };

  void build(std::size_t node, std::size_t first, std::size_t last, const std::vector<Vec3>& centers);
  void visit(std::size_t node, std::size_t first, std::size_t last, const Vec3& p, SurfacePoint& best) const;

  const std::vector<Vec3>& points_;
  const std::vector<Face>& faces_;
  std::vector<Index> order_;
  std::vector<Box> boxes_;  // a binary heap: the children of node i are 2i + 1 and 2i + 2
};

}  // namespace pahm::mesh
