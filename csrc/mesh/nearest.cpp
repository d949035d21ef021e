#include "mesh/nearest.h"

#include <algorithm>
#include <numeric>

namespace pahm::mesh {
namespace {

double squared_distance(const Vec3& a, const Vec3& b) {
  const double x = a[0] - b[0], y = a[1] - b[1], z = a[2] - b[2];
  return x * x + y * y + z * z;
}

}  // namespace

NearestVertices::NearestVertices(const std::vector<Vec3>& points)
    : points_(Scaling(points)(points)), order_(points.size()), axis_(points.size(), 0) {
  std::iota(order_.begin(), order_.end(), 0);
  split(0, order_.size());
}

void NearestVertices::split(size_t first, size_t last) {
  if (last - first <= leaf_size) return;
  Vec3 low = points_[order_[first]], high = low;
  for (size_t i = first; i < last; ++i) {
    for (int k = 0; k < 3; ++k) {
      low[k] = std::min(low[k], points_[order_[i]][k]);
      high[k] = std::max(high[k], points_[order_[i]][k]);
    }
  }
  int axis = 0;
  for (int k = 1; k < 3; ++k) {
    if (high[k] - low[k] > high[axis] - low[axis]) axis = k;
  }
  const size_t middle = first + (last - first) / 2;
  std::nth_element(
      order_.begin() + first, order_.begin() + middle, order_.begin() + last, [&](Index a, Index b) {
        return points_[a][axis] != points_[b][axis] ? points_[a][axis] < points_[b][axis] : a < b;
      });
  axis_[middle] = static_cast<uint8_t>(axis);
  split(first, middle);
  split(middle + 1, last);
}

void NearestVertices::visit(size_t first, size_t last, Index query, size_t count,
                            std::vector<Candidate>& heap) const {
  const auto offer = [&](Index index) {
    if (index == query) return;
    const Candidate candidate{squared_distance(points_[index], points_[query]), index};
    if (heap.size() < count) {
      heap.push_back(candidate);
      std::push_heap(heap.begin(), heap.end());
    } else if (candidate < heap.front()) {
      std::pop_heap(heap.begin(), heap.end());
      heap.back() = candidate;
      std::push_heap(heap.begin(), heap.end());
    }
  };
  if (last - first <= leaf_size) {
    for (size_t i = first; i < last; ++i) offer(order_[i]);
    return;
  }
  const size_t middle = first + (last - first) / 2;
  const int axis = axis_[middle];
  const double offset = points_[query][axis] - points_[order_[middle]][axis];
  offer(order_[middle]);
  const bool below = offset < 0;
  visit(below ? first : middle + 1, below ? middle : last, query, count, heap);
  if (heap.size() < count || offset * offset <= heap.front().distance) {
    visit(below ? middle + 1 : first, below ? last : middle, query, count, heap);
  }
}

void NearestVertices::query(Index query, size_t count, std::vector<Index>& out) const {
  out.assign(1, query);
  if (count <= 1) return;
  std::vector<Candidate> heap;
  heap.reserve(count);
  visit(0, order_.size(), query, count - 1, heap);
  std::sort_heap(heap.begin(), heap.end());
  for (const Candidate& candidate : heap) out.push_back(candidate.index);
}

}  // namespace pahm::mesh
