#include "mesh/collapse.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>

#include "mesh/quadric.h"
#include "mesh/scaling.h"

namespace pahm::mesh {
namespace {

// Weights relative to a face's own plane. The boundary's planes stand on its edges, at right angles to the
// face. The pull towards merged vertices spreads the remaining ones evenly where the surface is flat.
constexpr double boundary_weight = 10;
constexpr double point_weight = 1e-2;
// A face may turn by at most acos(min_turn). Its 2 * area / (sum of squared edges), which is 0.58 if
// equilateral, must stay above min_shape.
constexpr double min_turn = 0.2;
constexpr double min_shape = 0.05;

struct Candidate {
  int tier;  // 0: keeps the shape of the faces; 1: keeps only the topology
  double cost;
  Index from, to;
  uint32_t version;

  bool operator<(const Candidate& o) const {
    if (tier != o.tier) return tier < o.tier;
    if (cost != o.cost) return cost < o.cost;
    return from != o.from ? from < o.from : to < o.to;
  }
  bool operator>(const Candidate& o) const { return o < *this; }
};

class Collapser {
 public:
  Collapser(const std::vector<Vec3>& points, const std::vector<Face>& faces, const Adjacency& mesh)
      : points_(normalized(points)),
        faces_(faces),
        on_boundary_(mesh.on_boundary),
        around_(points.size()),
        face_alive_(faces.size(), 1),
        alive_(points.size(), 1),
        quadrics_(points.size()),
        version_(points.size(), 0),
        mark_(points.size(), 0) {
    for (size_t f = 0; f < faces.size(); ++f) {
      for (Index v : faces[f]) around_[v].push_back(static_cast<Index>(f));
    }
    add_quadrics();
    for (size_t v = 0; v < points.size(); ++v) push_best(static_cast<Index>(v), nullptr);
  }

  // False if no collapse is left that keeps the topology.
  bool step() {
    while (!heap_.empty()) {
      const Candidate best = heap_.top();
      heap_.pop();
      if (!alive_[best.from] || version_[best.from] != best.version) continue;
      if (keeps_topology(best.from, best.to) && (best.tier == 1 || keeps_shape(best.from, best.to))) {
        apply(best.from, best.to);
        return true;
      }
      push_best(best.from, &best);
    }
    return false;
  }

  Level snapshot() const {
    Level level;
    std::vector<Index> renumbered(alive_.size(), -1);
    for (size_t v = 0; v < alive_.size(); ++v) {
      if (!alive_[v]) continue;
      renumbered[v] = static_cast<Index>(level.selection.size());
      level.selection.push_back(static_cast<Index>(v));
    }
    for (size_t f = 0; f < faces_.size(); ++f) {
      if (!face_alive_[f]) continue;
      level.faces.push_back({renumbered[faces_[f][0]], renumbered[faces_[f][1]], renumbered[faces_[f][2]]});
    }
    return level;
  }

 private:
  // Centred, with a bounding box of diagonal 1, so that the sums of the quadrics stay well conditioned.
  static std::vector<Vec3> normalized(const std::vector<Vec3>& points) {
    if (points.empty()) return {};
    std::vector<Vec3> out = Scaling(points)(points);
    Vec3 low = out[0], high = out[0];
    for (const Vec3& p : out) {
      for (int k = 0; k < 3; ++k) {
        low[k] = std::min(low[k], p[k]);
        high[k] = std::max(high[k], p[k]);
      }
    }
    const Vec3 center = 0.5 * (low + high), extent = high - low;
    const double diagonal = std::sqrt(dot(extent, extent));
    for (Vec3& p : out) p = (diagonal > 0 ? 1 / diagonal : 1.0) * (p - center);
    return out;
  }

  void add_quadrics() {
    for (const Face& face : faces_) {
      const Vec3 &a = points_[face[0]], &b = points_[face[1]], &c = points_[face[2]];
      const Vec3 normal = cross(b - a, c - a);
      const double doubled_area = std::sqrt(dot(normal, normal));
      if (doubled_area == 0) continue;
      const Vec3 unit = (1 / doubled_area) * normal;
      for (int k = 0; k < 3; ++k) {
        const Index v = face[k], w = face[(k + 1) % 3];
        quadrics_[v].add_plane(points_[v], unit, doubled_area);
        quadrics_[v].add_point(points_[v], point_weight * doubled_area);
        if (!on_boundary_[v] || !on_boundary_[w] || shared_faces(v, w) != 1) continue;
        const Vec3 edge = points_[w] - points_[v];
        const Vec3 wall = cross(edge, unit);
        const double length = std::sqrt(dot(wall, wall));
        if (length == 0) continue;
        for (Index end : {v, w}) {
          quadrics_[end].add_plane(points_[v], (1 / length) * wall, boundary_weight * length * length);
        }
      }
    }
  }

  int shared_faces(Index u, Index v) const {
    int count = 0;
    for (Index f : around_[u]) count += contains(f, v);
    return count;
  }

  bool contains(Index f, Index v) const {
    return faces_[f][0] == v || faces_[f][1] == v || faces_[f][2] == v;
  }

  void gather_ring(Index v, std::vector<Index>& ring) {
    ring.clear();
    const uint64_t id = ++mark_id_;
    mark_[v] = id;
    for (Index f : around_[v]) {
      for (Index w : faces_[f]) {
        if (mark_[w] == id) continue;
        mark_[w] = id;
        ring.push_back(w);
      }
    }
  }

  // Queues the cheapest collapse of u that comes after `previous`. Tier 1 comes after the last one of tier 0.
  void push_best(Index u, const Candidate* previous) {
    gather_ring(u, ring_);
    for (int tier = previous ? previous->tier : 0; tier < 2; ++tier) {
      Candidate best{tier, 0, u, -1, version_[u]};
      for (Index v : ring_) {
        Quadric sum = quadrics_[u];
        sum += quadrics_[v];
        const Candidate candidate{tier, std::max(0.0, sum.at(points_[v])), u, v, version_[u]};
        if ((!previous || *previous < candidate) && (best.to < 0 || candidate < best)) best = candidate;
      }
      if (best.to >= 0) {
        heap_.push(best);
        return;
      }
    }
  }

  // The link condition: the only common neighbours of u and v are those across the edge, where the outside of
  // every boundary loop counts as one more vertex. Also u and v do not span a tetrahedron or a lone triangle.
  bool keeps_topology(Index u, Index v) {
    const int shared = shared_faces(u, v);
    if (shared == 2 && on_boundary_[u]) return false;
    if (shared == 2 && !on_boundary_[v] && around_[u].size() == 3 && around_[v].size() == 3) return false;
    if (shared == 1 && around_[u].size() == 1 && around_[v].size() == 1) return false;
    gather_ring(u, ring_);
    const uint64_t of_u = mark_id_;
    int common = 0;
    for (Index f : around_[v]) {
      for (Index w : faces_[f]) {
        if (mark_[w] != of_u || w == u || w == v) continue;
        mark_[w] = 0;
        ++common;
      }
    }
    return common == shared;
  }

  bool keeps_shape(Index u, Index v) const {
    for (Index f : around_[u]) {
      if (contains(f, v)) continue;
      const Face& face = faces_[f];
      const int k = face[0] == u ? 0 : face[1] == u ? 1 : 2;
      const Vec3 &p = points_[face[(k + 1) % 3]], &q = points_[face[(k + 2) % 3]];
      const Vec3 to_p = p - points_[v], to_q = q - points_[v], across = q - p;
      const Vec3 before = cross(p - points_[u], q - points_[u]), after = cross(to_p, to_q);
      const double area_before = std::sqrt(dot(before, before)), area_after = std::sqrt(dot(after, after));
      if (area_after <= min_shape * (dot(to_p, to_p) + dot(to_q, to_q) + dot(across, across))) return false;
      if (dot(before, after) < min_turn * area_before * area_after) return false;
    }
    return true;
  }

  void apply(Index u, Index v) {
    for (Index f : around_[u]) {
      if (contains(f, v)) {
        face_alive_[f] = 0;
        for (Index w : faces_[f]) {
          if (w != u) around_[w].erase(std::find(around_[w].begin(), around_[w].end(), f));
        }
      } else {
        std::replace(faces_[f].begin(), faces_[f].end(), u, v);
        around_[v].push_back(f);
      }
    }
    alive_[u] = 0;
    std::vector<Index>().swap(around_[u]);
    quadrics_[v] += quadrics_[u];
    gather_ring(v, touched_);
    touched_.push_back(v);
    for (Index w : touched_) {
      ++version_[w];
      push_best(w, nullptr);
    }
  }

  const std::vector<Vec3> points_;
  std::vector<Face> faces_;
  const std::vector<uint8_t> on_boundary_;
  std::vector<std::vector<Index>> around_;  // faces of each vertex
  std::vector<uint8_t> face_alive_, alive_;
  std::vector<Quadric> quadrics_;
  std::vector<uint32_t> version_;
  std::vector<uint64_t> mark_;
  uint64_t mark_id_ = 0;
  std::vector<Index> ring_, touched_;
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<Candidate>> heap_;
};

}  // namespace

std::vector<Level> collapse(const std::vector<Vec3>& points, const std::vector<Face>& faces,
                            const Adjacency& mesh, const std::vector<Index>& sizes) {
  Collapser collapser(points, faces, mesh);
  std::vector<Level> levels;
  auto count = static_cast<Index>(points.size());
  for (Index size : sizes) {
    for (; count > size; --count) {
      if (!collapser.step()) {
        throw std::invalid_argument("sizes cannot be reached: the mesh keeps its topology down to " +
                                    std::to_string(count) + " vertices, got size " + std::to_string(size));
      }
    }
    levels.push_back(collapser.snapshot());
  }
  return levels;
}

}  // namespace pahm::mesh
