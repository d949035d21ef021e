// Spiral index tables, as SpiralNet++ defines them.
#pragma once

#include "mesh/topology.h"

namespace pahm::mesh {

// Writes vertex_count rows of `length` indices to out. `points` may be null; it is needed, and
// std::invalid_argument says for which row, where the rings around a vertex run out and its row is filled
// with the nearest vertices. length * dilation <= vertex_count.
void spiral_table(const Adjacency& mesh, size_t length, size_t dilation, const std::vector<Vec3>* points,
                  int64_t* out);

}  // namespace pahm::mesh
