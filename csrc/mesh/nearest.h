// Finds the k nearest vertices of a vertex with a k-d tree.
#pragma once

#include "mesh/scaling.h"
#include "mesh/topology.h"

namespace pahm::mesh {

class NearestVertices {
 public:
  // Takes finite points of any size.
  explicit NearestVertices(const std::vector<Vec3>& points);

  // The `count` points nearest to points[query]: itself first, then by distance, equal distances by index.
  void query(Index query, size_t count, std::vector<Index>& out) const;

 private:
  static constexpr size_t leaf_size = 12;

  struct Candidate {
    double distance;
    Index index;
    bool operator<(const Candidate& other) const {
      return distance != other.distance ? distance < other.distance : index < other.index;
    }
  };

  void split(size_t first, size_t last);
  void visit(size_t first, size_t last, Index query, size_t count, std::vector<Candidate>& heap) const;

  const std::vector<Vec3> points_;  // scaled
  std::vector<Index> order_;
  std::vector<uint8_t> axis_;  // the axis of the node whose median is at this place of order_
};

}  // namespace pahm::mesh
