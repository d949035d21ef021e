// The k nearest vertices of a vertex: a k-d tree.
#pragma once

#include "scaling.h"
#include "topology.h"

namespace pahm::mesh {

class NearestVertices {
 public:
  // Finite points of any size.
  explicit NearestVertices(const std::vector<Vec3>& points);

  // The `count` points nearest to points[query]: itself first, then by distance, equal distances by index.
  void query(Index query, std::size_t count, std::vector<Index>& out) const;

 private:
  static constexpr std::size_t kLeaf = 12;

  struct Candidate {
    double distance;
    Index index;
    bool operator<(const Candidate& other) const {
      return distance != other.distance ? distance < other.distance : index < other.index;
    }
  };

  void split(std::size_t first, std::size_t last);
  void visit(std::size_t first, std::size_t last, Index query, std::size_t count,
             std::vector<Candidate>& heap) const;

  const std::vector<Vec3> points_;  // scaled
  std::vector<Index> order_;
  std::vector<std::uint8_t> axis_;  // of the node whose median stands at this place of order_
};

}  // namespace pahm::mesh
