// Quadric edge collapse into end points.
#pragma once

#include "mesh/topology.h"

namespace pahm::mesh {

struct Level {
  std::vector<Index> selection;  // ascending indices of the level's vertices in the input mesh
  std::vector<Face> faces;       // into `selection`
};

// One level for each of `sizes`, which descend strictly from at most points.size(). Every vertex has a face.
//
// A vertex is removed by moving it onto a neighbour (half-edge collapse), so every level's vertices are
// vertices of the input. The collapse that adds the least quadric error comes first (Garland and Heckbert,
// "Surface simplification using quadric error metrics", 1997), equal errors by vertex index. The link
// condition keeps every level a manifold with the input's topology; boundary vertices move only along the
// boundary. Collapses that would flip a face or turn it into a sliver come after all others. Throws
// std::invalid_argument if a size cannot be reached.
std::vector<Level> collapse(const std::vector<Vec3>& points, const std::vector<Face>& faces,
                            const Adjacency& mesh, const std::vector<Index>& sizes);

}  // namespace pahm::mesh
