#include "mesh/topology.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace pahm::mesh {
namespace {

// One of a face's vertices v, with its neighbours in the face: the face is (v, next, prev) up to rotation.
struct Corner {
  Index next, prev, face;
};

std::string edge_name(Index a, Index b) {
  return "edge (" + std::to_string(std::min(a, b)) + ", " + std::to_string(std::max(a, b)) + ")";
}

[[noreturn]] void refuse_edge(Index v, Index w, const Corner* first, const Corner* last) {
  std::vector<Index> owners;
  for (const Corner* c = first; c != last; ++c) {
    if (c->next == w || c->prev == w) owners.push_back(c->face);
  }
  std::sort(owners.begin(), owners.end());
  if (owners.size() > 2) {
    std::string list;
    for (size_t i = 0; i < std::min<size_t>(owners.size(), 6); ++i) {
      list += (i ? ", " : "") + std::to_string(owners[i]);
    }
    throw std::invalid_argument("faces are not manifold: " + edge_name(v, w) + " belongs to " +
                                std::to_string(owners.size()) + " faces (" + list +
                                (owners.size() > 6 ? ", ..." : "") + "), expected at most 2");
  }
  throw std::invalid_argument("faces are not consistently oriented: faces " + std::to_string(owners[0]) +
                              " and " + std::to_string(owners[1]) + " run along " + edge_name(v, w) +
                              " in the same direction, expected opposite directions");
}

[[noreturn]] void refuse_vertex(Index v) {
  throw std::invalid_argument(
      "faces are not manifold: the faces around vertex " + std::to_string(v) +
      " form more than one fan, so that they meet in that vertex only, expected one fan");
}

}  // namespace

Adjacency build_adjacency(const std::vector<Face>& faces, Index vertex_count) {
  std::vector<size_t> starts(static_cast<size_t>(vertex_count) + 1, 0);
  for (size_t f = 0; f < faces.size(); ++f) {
    const auto [a, b, c] = faces[f];
    if (a == b || b == c || c == a) {
      throw std::invalid_argument("faces must have three different vertices, got face " + std::to_string(f) +
                                  " = (" + std::to_string(a) + ", " + std::to_string(b) + ", " +
                                  std::to_string(c) + ")");
    }
    for (Index v : faces[f]) ++starts[v + 1];
  }
  for (Index v = 0; v < vertex_count; ++v) starts[v + 1] += starts[v];

  std::vector<Corner> corners(faces.size() * 3);
  {
    std::vector<size_t> fill(starts.begin(), starts.end() - 1);
    for (size_t f = 0; f < faces.size(); ++f) {
      for (int k = 0; k < 3; ++k) {
        corners[fill[faces[f][k]]++] = {faces[f][(k + 1) % 3], faces[f][(k + 2) % 3], static_cast<Index>(f)};
      }
    }
  }

  Adjacency out;
  out.offsets.reserve(starts.size());
  out.offsets.push_back(0);
  out.neighbors.reserve(corners.size() + corners.size() / 8);
  out.on_boundary.assign(vertex_count, 0);
  std::vector<Index> nexts;
  Index pinched = -1;  // reported only if every edge is right
  for (Index v = 0; v < vertex_count; ++v) {
    Corner* first = corners.data() + starts[v];
    Corner* last = corners.data() + starts[v + 1];
    const size_t count = last - first;
    if (count == 0) {
      out.offsets.push_back(out.neighbors.size());
      continue;
    }
    Index start = (last - 1)->next;  // corners are still in file order
    std::sort(first, last, [](const Corner& a, const Corner& b) { return a.prev < b.prev; });
    nexts.clear();
    for (const Corner* c = first; c != last; ++c) nexts.push_back(c->next);
    std::sort(nexts.begin(), nexts.end());
    const auto same_prev = [](const Corner& a, const Corner& b) { return a.prev == b.prev; };
    const auto shared_next = std::adjacent_find(nexts.begin(), nexts.end());
    const Corner* shared_prev = std::adjacent_find(first, last, same_prev);
    if (shared_next != nexts.end() || shared_prev != last) {
      constexpr Index none = std::numeric_limits<Index>::max();
      refuse_edge(v,
                  std::min(shared_next != nexts.end() ? *shared_next : none,
                           shared_prev != last ? shared_prev->prev : none),
                  first, last);
    }

    size_t open_ends = 0;
    for (const Corner* c = first; c != last; ++c) {
      if (!std::binary_search(nexts.begin(), nexts.end(), c->prev)) {
        start = c->prev;
        ++open_ends;
      }
    }
    // Each corner leads clockwise from its prev to its next.
    Index at = start;
    size_t steps = 0;
    do {
      out.neighbors.push_back(at);
      const Corner* c =
          std::lower_bound(first, last, at, [](const Corner& corner, Index w) { return corner.prev < w; });
      if (c == last || c->prev != at) break;
      at = c->next;
      ++steps;
    } while (at != start);
    if (pinched < 0 && (open_ends > 1 || steps != count)) pinched = v;
    out.on_boundary[v] = open_ends == 1;
    out.offsets.push_back(out.neighbors.size());
  }
  if (pinched >= 0) refuse_vertex(pinched);
  return out;
}

}  // namespace pahm::mesh
