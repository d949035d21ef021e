// The ordered neighbours of every vertex of a triangle mesh, and the check that the mesh is manifold.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pahm::mesh {

using Index = int32_t;
using Face = std::array<Index, 3>;
using Vec3 = std::array<double, 3>;

// Neighbours of vertex v: neighbors[offsets[v]] ... neighbors[offsets[v + 1] - 1], clockwise seen from
// outside. An interior vertex's list starts with the vertex that follows it in the last face that contains
// it, a boundary vertex's list with the neighbour w for which no face has the directed edge v -> w. A vertex
// without a face has no neighbours.
struct Adjacency {
  std::vector<size_t> offsets;
  std::vector<Index> neighbors;
  std::vector<uint8_t> on_boundary;

  const Index* begin(Index v) const { return neighbors.data() + offsets[v]; }
  const Index* end(Index v) const { return neighbors.data() + offsets[v + 1]; }
};

// faces hold indices in [0, vertex_count). Throws std::invalid_argument, which names the offending face, edge
// or vertex, unless the mesh is an oriented 2-manifold, with or without boundary.
Adjacency build_adjacency(const std::vector<Face>& faces, Index vertex_count);

}  // namespace pahm::mesh
