#include "mesh/spirals.h"

#include <memory>
#include <stdexcept>
#include <string>

#include "mesh/nearest.h"

namespace pahm::mesh {
namespace {

// Grows the row of one vertex ring by ring. The marks hold a counter that only grows, so none are cleared.
class RingWalk {
 public:
  RingWalk(const Adjacency& mesh, size_t vertex_count)
      : mesh_(mesh), seen_(vertex_count), ring_(vertex_count) {}

  // False if the rings ran out. As in SpiralNet++, they have run out as soon as the ring after the last one
  // taken is empty, even if the row is already full.
  bool row(Index vertex, size_t wanted, std::vector<Index>& out) {
    ++row_id_;
    out.assign(1, vertex);
    seen_[vertex] = row_id_;
    if (wanted == 1) return true;
    last_.assign(mesh_.begin(vertex), mesh_.end(vertex));
    for (Index u : last_) seen_[u] = row_id_;
    for (;;) {
      out.insert(out.end(), last_.begin(), last_.end());
      // Walk only the used part of the ring that fills the row, but always check for an empty ring.
      const size_t missing = out.size() < wanted ? wanted - out.size() : 1;
      next_ring(missing);
      if (next_.empty()) return false;
      if (next_.size() >= missing) break;
      last_.swap(next_);
    }
    out.insert(out.end(), next_.begin(), next_.end());
    return true;
  }

 private:
  void next_ring(size_t limit) {
    ++ring_id_;
    for (Index u : last_) ring_[u] = ring_id_;
    next_.clear();
    for (Index u : last_) {
      const Index* first = mesh_.begin(u);
      const Index* last = mesh_.end(u);
      const Index* pivot = first;
      while (pivot != last && ring_[*pivot] != ring_id_) ++pivot;
      for (const Index* w = pivot == last ? last : pivot + 1; w != last; ++w) take(*w);
      for (const Index* w = first; w != pivot; ++w) take(*w);
      if (next_.size() >= limit) return;
    }
  }

  void take(Index w) {
    if (seen_[w] == row_id_) return;
    seen_[w] = row_id_;
    next_.push_back(w);
  }

  const Adjacency& mesh_;
  std::vector<int64_t> seen_, ring_;
  std::vector<Index> last_, next_;
  int64_t row_id_ = 0, ring_id_ = 0;
};

}  // namespace

void spiral_table(const Adjacency& mesh, size_t length, size_t dilation, const std::vector<Vec3>* points,
                  int64_t* out) {
  const size_t vertex_count = mesh.on_boundary.size();
  const size_t wanted = length * dilation;
  RingWalk walk(mesh, vertex_count);
  std::unique_ptr<NearestVertices> nearest;
  std::vector<Index> row;
  for (size_t v = 0; v < vertex_count; ++v) {
    if (!walk.row(static_cast<Index>(v), wanted, row)) {
      if (points == nullptr) {
        throw std::invalid_argument("vertices are needed: the rings around vertex " + std::to_string(v) +
                                    " run out before its row of length * dilation = " +
                                    std::to_string(wanted) + " is full, and the nearest vertices fill it");
      }
      if (!nearest) nearest = std::make_unique<NearestVertices>(*points);
      nearest->query(static_cast<Index>(v), wanted, row);
    }
    for (size_t l = 0; l < length; ++l) *out++ = row[l * dilation];
  }
}

}  // namespace pahm::mesh
