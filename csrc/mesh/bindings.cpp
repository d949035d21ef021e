// The Python interface of this folder: numpy arrays in, numpy arrays out. The Python callers in pahm_ops/mesh
// check dtypes, shapes and ranges and word those errors. Errors about topology come from here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>

#include "mesh/closest.h"
#include "mesh/collapse.h"
#include "mesh/spirals.h"

namespace py = pybind11;

namespace pahm::mesh {
namespace {

using IntArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using RealArray = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Row `row` of an array (N, 3); numpy arrays may be unaligned.
template <typename T, typename Array>
std::array<T, 3> read_row(const Array& array, size_t row) {
  std::array<T, 3> out;
  std::memcpy(out.data(), array.data(row), sizeof(out));
  return out;
}

std::vector<Face> read_faces(const IntArray& array, int64_t vertex_count) {
  if (array.ndim() != 2 || array.shape(1) != 3) throw std::invalid_argument("faces must have shape (F, 3)");
  if (vertex_count < 0 || vertex_count >= std::numeric_limits<Index>::max() ||
      array.shape(0) > std::numeric_limits<Index>::max() / 3) {
    throw std::invalid_argument("meshes must have fewer than 2^31 vertices and corners");
  }
  std::vector<Face> faces(array.shape(0));
  for (size_t f = 0; f < faces.size(); ++f) {
    const auto row = read_row<int64_t>(array, f);
    for (int k = 0; k < 3; ++k) {
      if (row[k] < 0 || row[k] >= vertex_count) throw std::out_of_range("faces must index the vertices");
      faces[f][k] = static_cast<Index>(row[k]);
    }
  }
  return faces;
}

std::vector<Vec3> read_points(const RealArray& array) {
  if (array.ndim() != 2 || array.shape(1) != 3) throw std::invalid_argument("points must have shape (N, 3)");
  std::vector<Vec3> points(array.shape(0));
  for (size_t v = 0; v < points.size(); ++v) {
    points[v] = read_row<double>(array, v);
    for (const double x : points[v]) {
      if (!std::isfinite(x)) {
        throw std::invalid_argument("points must be finite, got " + std::to_string(x) + " at point " +
                                    std::to_string(v));
      }
    }
  }
  return points;
}

py::array_t<int64_t> spirals(const IntArray& faces, int64_t vertex_count, size_t length, size_t dilation,
                             const std::optional<RealArray>& vertices) {
  const std::vector<Face> face_list = read_faces(faces, vertex_count);
  std::optional<std::vector<Vec3>> points;
  if (vertices) points = read_points(*vertices);
  const auto rows = static_cast<size_t>(vertex_count);
  if ((points && points->size() != rows) || length < 1 || dilation < 1 || length > rows / dilation) {
    throw std::invalid_argument("vertices, length and dilation must fit the number of vertices");
  }
  py::array_t<int64_t> table({rows, length});
  int64_t* out = table.mutable_data();
  {
    py::gil_scoped_release release;
    spiral_table(build_adjacency(face_list, static_cast<Index>(vertex_count)), length, dilation,
                 points ? &*points : nullptr, out);
  }
  return table;
}

py::list levels(const RealArray& vertices, const IntArray& faces, const std::vector<Index>& sizes) {
  const std::vector<Vec3> points = read_points(vertices);
  const std::vector<Face> face_list = read_faces(faces, static_cast<int64_t>(points.size()));
  std::vector<Level> found;
  {
    py::gil_scoped_release release;
    const Adjacency mesh = build_adjacency(face_list, static_cast<Index>(points.size()));
    for (size_t v = 0; v < points.size(); ++v) {
      if (mesh.offsets[v] == mesh.offsets[v + 1]) {
        throw std::invalid_argument("vertices must all belong to a face, but vertex " + std::to_string(v) +
                                    " belongs to none");
      }
    }
    found = collapse(points, face_list, mesh, sizes);
  }
  py::list out;
  for (const Level& level : found) {
    py::array_t<int64_t> selection(static_cast<py::ssize_t>(level.selection.size()));
    std::copy(level.selection.begin(), level.selection.end(), selection.mutable_data());
    py::array_t<int64_t> level_faces({level.faces.size(), size_t{3}});
    int64_t* to = level_faces.mutable_data();
    for (const Face& face : level.faces) to = std::copy(face.begin(), face.end(), to);
    out.append(py::make_tuple(selection, level_faces));
  }
  return out;
}

py::tuple closest(const RealArray& vertices, const IntArray& faces, const RealArray& queries) {
  const std::vector<Vec3> points = read_points(vertices), targets = read_points(queries);
  const std::vector<Face> face_list = read_faces(faces, static_cast<int64_t>(points.size()));
  if (face_list.empty()) throw std::invalid_argument("faces must not be empty");
  py::array_t<int64_t> corners({targets.size(), size_t{3}});
  py::array_t<double> weights({targets.size(), size_t{3}});
  int64_t* corner = corners.mutable_data();
  double* weight = weights.mutable_data();
  {
    py::gil_scoped_release release;
    const SurfaceTree tree(points, face_list);
    for (const Vec3& target : targets) {
      const SurfacePoint found = tree.closest(target);
      corner = std::copy(face_list[found.face].begin(), face_list[found.face].end(), corner);
      weight = std::copy(found.weights.begin(), found.weights.end(), weight);
    }
  }
  return py::make_tuple(corners, weights);
}

}  // namespace
}  // namespace pahm::mesh

PYBIND11_MODULE(_tables, m) {
  using namespace pahm::mesh;
  m.doc() = "Index tables of triangle meshes, compiled; see pahm_ops.mesh.";
  m.def("spirals", &spirals, py::arg("faces"), py::arg("vertex_count"), py::arg("length"),
        py::arg("dilation"), py::arg("vertices"), "Spiral index table (vertex_count, length), int64.");
  m.def("levels", &levels, py::arg("vertices"), py::arg("faces"), py::arg("sizes"),
        "Quadric edge collapse: a (selection, faces) pair for each size.");
  m.def("closest", &closest, py::arg("vertices"), py::arg("faces"), py::arg("queries"),
        "Corners (Q, 3) of the nearest face of each query point, and barycentric weights (Q, 3).");
}
