// Spiral index tables as SpiralNet++ defines them.
#pragma once

#include "mesh/topology.h"

namespace pahm::mesh {

// Writes vertex_count rows of `length` indices to out; length * dilation <= vertex_count. If the rings around
// a vertex run out, its row is filled with the nearest vertices, which needs `points`. If `points` is null
// then, throws std::invalid_argument, which names the row.
void spiral_table(const Adjacency& mesh, size_t length, size_t dilation, const std::vector<Vec3>* points,
                  int64_t* out);

}  // namespace pahm::mesh
