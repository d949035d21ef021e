// Nearest points on a triangle mesh: a tree of axis-aligned boxes.
#pragma once

#include "mesh/scaling.h"
#include "mesh/topology.h"

namespace pahm::mesh {

struct SurfacePoint {
  Index face;
  std::array<double, 3> weights;  // barycentric, each in [0, 1], summing to 1
  double squared_distance;
};

class SurfaceTree {
 public:
  // Finite points of any size; at least one face, with indices into points. Keeps a reference to faces.
  SurfaceTree(const std::vector<Vec3>& points, const std::vector<Face>& faces);

  // p may be any finite point. At equal distances the first face in file order wins.
  SurfacePoint closest(const Vec3& p) const;

 private:
  static constexpr size_t leaf_size = 4;

  struct Box {
    Vec3 low, high;
  };

  void build(size_t node, size_t first, size_t last, const std::vector<Vec3>& centers);
  void visit(size_t node, size_t first, size_t last, const Vec3& p, SurfacePoint& best) const;
  SurfacePoint closest_on_face(Index face, const Vec3& p) const;

  const Scaling scaling_;
  const std::vector<Vec3> points_;  // scaled
  const std::vector<Face>& faces_;
  std::vector<Index> order_;
  std::vector<Box> boxes_;  // a binary heap: the children of node i are 2i + 1 and 2i + 2
};

}  // namespace pahm::mesh
