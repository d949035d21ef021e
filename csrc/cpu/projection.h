// Projects vertices to normalised image coordinates, and takes gradients back.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "cpu/parallel.h"

namespace pahm {

// Vertices, camera and image in the form that the kernels take: contiguous, in the type they compute in.
struct View {
  Tensor vertices;
  std::optional<Tensor> camera;
  int64_t height, width;
  bool align_corners;

  bool weak() const { return camera && camera->dim() == 2; }
  bool perspective() const { return camera && camera->dim() == 3; }
};

template <typename T>
bool finite(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(p[i])) return false;
  }
  return true;
}

// Pixels to normalised coordinates: multiply, then add.
template <typename T>
void normalisation(int64_t size, bool align_corners, T& scale, T& shift) {
  scale = T(2) / static_cast<T>(align_corners ? size - 1 : size);
  shift = (align_corners ? T(0) : T(1) / static_cast<T>(size)) - 1;
}

template <typename T>
struct Projection {
  const T* camera;
  T scale[2] = {}, shift[2] = {};
  bool weak, perspective, camera_finite;

  Projection(const View& view, int64_t item)
      : camera(nullptr), weak(view.weak()), perspective(view.perspective()), camera_finite(true) {
    if (!view.camera) return;
    const int64_t count = perspective ? 9 : 3;
    camera = view.camera->const_data_ptr<T>() + item * count;
    camera_finite = finite(camera, count);
    if (perspective) {
      normalisation(view.width, view.align_corners, scale[0], shift[0]);
      normalisation(view.height, view.align_corners, scale[1], shift[1]);
    }
  }

  T ray(const T* v, int i) const {
    return camera[3 * i] * v[0] + camera[3 * i + 1] * v[1] + camera[3 * i + 2] * v[2];
  }

  // Sets NaN for an invalid vertex; returns false for a vertex behind the camera.
  bool apply(const T* v, T* point) const {
    point[0] = point[1] = std::numeric_limits<T>::quiet_NaN();
    if (!camera_finite || !finite(v, camera == nullptr ? 2 : 3)) return true;
    T p[2] = {v[0], v[1]};
    if (weak) {
      for (int i = 0; i < 2; ++i) p[i] = camera[0] * (v[i] + camera[1 + i]);
    } else if (perspective) {
      const T depth = ray(v, 2);
      if (depth <= 0) return false;
      for (int i = 0; i < 2; ++i) p[i] = ray(v, i) / depth * scale[i] + shift[i];
    }
    if (finite(p, 2)) std::copy(p, p + 2, point);
    return true;
  }

  // Adds to the camera's gradient, sets the vertex's gradient.
  void backward(const T* v, const T* point, const T* g, T* vertex_grad, double* camera_grad) const {
    const int width = camera == nullptr ? 2 : 3;
    std::fill(vertex_grad, vertex_grad + width, T(0));
    if (point[0] != point[0]) return;
    if (weak) {
      for (int i = 0; i < 2; ++i) {
        vertex_grad[i] = camera[0] * g[i];
        camera_grad[0] += static_cast<double>(g[i]) * (v[i] + camera[1 + i]);
        camera_grad[1 + i] += static_cast<double>(camera[0]) * g[i];
      }
    } else if (perspective) {
      const T depth = ray(v, 2);
      T r[3] = {g[0] * scale[0] / depth, g[1] * scale[1] / depth, 0};
      r[2] = -(r[0] * (ray(v, 0) / depth) + r[1] * (ray(v, 1) / depth));
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          vertex_grad[j] += camera[3 * i + j] * r[i];
          camera_grad[3 * i + j] += static_cast<double>(r[i]) * v[j];
        }
      }
    } else {
      std::copy(g, g + 2, vertex_grad);
    }
  }
};

// (B, N, 2) normalised points. A vertex behind the camera is an error (`strict`) or invalid.
template <typename T>
std::vector<T> project(const View& view, bool strict) {
  const int64_t batch = view.vertices.size(0), count = view.vertices.size(1), width = view.vertices.size(2);
  std::vector<T> points(static_cast<size_t>(batch * count * 2));
  std::vector<int64_t> behind(static_cast<size_t>(view.perspective() ? batch : 0), -1);
  const T* vertices = view.vertices.const_data_ptr<T>();
  parallel_for(batch, count * 16, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Projection<T> projection(view, b);
      for (int64_t n = count - 1; n >= 0; --n) {
        if (!projection.apply(vertices + (b * count + n) * width, points.data() + (b * count + n) * 2))
          behind[b] = n;
      }
    }
  });
  for (int64_t b = 0; strict && view.perspective() && b < batch; ++b) {
    if (behind[b] < 0) continue;
    const T depth = Projection<T>(view, b).ray(vertices + (b * count + behind[b]) * width, 2);
    check(false, "vertices must lie in front of the camera (depth > 0), but vertex " +
                     std::to_string(behind[b]) + " of batch item " + std::to_string(b) +
                     " is behind the camera at depth " + std::to_string(depth));
  }
  return points;
}

}  // namespace pahm
