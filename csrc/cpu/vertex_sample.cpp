// Feature maps (B, C_s, H_s, W_s), any number and scale, sampled bilinearly at projected vertices:
// vertices (B, N, 3 or 2), camera none, (B, 3) or (B, 3, 3)  ->  (B, N, C_1 + ... + C_S).
//
// Work is cut into units (a map's vertices or a map's channels) by shapes alone, never by the number of
// threads, and every sum stays inside one unit, in vertex order. So the number of threads changes no bits.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/projection.h"
#include "cpu/scratch.h"
#include "cpu/vertex_sample_shared.h"

#define PAHM_KERNEL_FILE "cpu/vertex_sample.h"
#include "cpu/foreach_isa.h"

namespace pahm {
namespace {

using Maps = std::vector<Tensor>;

constexpr int64_t most_channels = 1 << 24;  // of a map

View check_arguments(const Maps& features, const Tensor& vertices, const std::optional<Tensor>& camera,
                     int64_t height, int64_t width, bool align_corners) {
  check(!features.empty(), "features must hold at least one map");
  for (const Tensor& map : features) {
    check_cpu(map, "features");
    check(map.dim() == 4 && map.size(0) == features[0].size(0),
          "features must be (B, C, H, W) of one batch size");
    check(map.size(2) > 0 && map.size(3) > 0, "features must have a height and a width");
    product(product(map.size(0), map.size(1)), product(map.size(2), map.size(3)));
    // Work is divided by channels before memory for them is allocated, so check their number first.
    check(map.size(1) <= most_channels, [&] {
      return "features must have at most " + std::to_string(most_channels) + " channels, got " +
             std::to_string(map.size(1));
    });
    check_same_type(features[0], map, "features");
  }
  check_cpu(vertices, "vertices");
  check(
      vertices.dim() == 3 && vertices.size(0) == features[0].size(0) && vertices.size(2) == (camera ? 3 : 2),
      "vertices must be (B, N, 3) with a camera and (B, N, 2) without");
  const ScalarType type = compute_type(features[0].scalar_type());
  const auto prepare = [&](const Tensor& t, const char* name) {
    check(t.scalar_type() == type || t.scalar_type() == features[0].scalar_type(),
          [&] { return std::string(name) + " must have the maps' dtype, or float32 with bfloat16 maps"; });
    return as_contiguous(of_type(t, type));
  };
  View view{prepare(vertices, "vertices"), std::nullopt, height, width, align_corners};
  if (camera) {
    check_cpu(*camera, "camera");
    const int64_t rank = camera->dim();
    check((rank == 2 || rank == 3) && camera->size(0) == vertices.size(0) && camera->size(1) == 3 &&
              camera->size(rank - 1) == 3,
          "camera must be (B, 3) or (B, 3, 3)");
    check(rank == 2 || std::min(height, width) > (align_corners ? 1 : 0), "image_size is too small");
    view.camera = prepare(*camera, "camera");
  }
  return view;
}

int64_t dense_block(int64_t pixels) {
  return std::clamp<int64_t>(cached / pixels / plane_block * plane_block, plane_block, row_block);
}

// Everything that a call needs besides its tensors.
struct Plan {
  std::vector<SampleMap> maps;
  std::vector<SampleUnit> units;
  std::vector<char> zeros;
  int64_t scratch = 0;  // elements that a thread needs
  SampleJob job{};

  Plan(const Maps& features, const View& view, bool border, bool forward) {
    job.vertices = view.vertices.size(1);
    job.align_corners = view.align_corners;
    job.border = border;
    const bool narrow = features[0].scalar_type() == ScalarType::BFloat16;
    int64_t widest = 0;
    maps.reserve(features.size());
    units.reserve(4 * features.size());
    for (const Tensor& f : features) {
      const int64_t channels = f.size(1), pixels = f.size(2) * f.size(3);
      const Layout layout = channels == 1 || f.stride(1) == 1 ? Layout::rows
                            : pixels <= 8 * job.vertices      ? Layout::dense_planes
                                                              : Layout::planes;
      const bool by_vertex = forward && layout == Layout::rows;
      const int64_t block = by_vertex                        ? vertex_block
                            : layout == Layout::rows         ? row_block
                            : layout == Layout::dense_planes ? dense_block(pixels)
                                                             : plane_block;
      const int64_t count = by_vertex ? job.vertices : channels, index = static_cast<int64_t>(maps.size());
      for (int64_t begin = 0; begin < count; begin += block) {
        units.push_back({index, begin, std::min(count, begin + block)});
      }
      maps.push_back({f.const_data_ptr(), nullptr, channels, f.size(2), f.size(3), job.channels, f.stride(0),
                      f.stride(1), f.stride(2), f.stride(3), layout});
      job.channels += channels;
      widest = std::max(widest, channels);
      const int64_t copies = (layout == Layout::dense_planes ? 1 : 0) +
                             (!forward && (narrow || layout == Layout::dense_planes) ? 1 : 0);
      scratch = std::max(scratch, copies * pixels * std::min(channels, block));
    }
    zeros.resize(static_cast<size_t>(widest) * sizeof(double), 0);
    job.zeros = zeros.data();
    job.maps = maps.data();
    job.units = units.data();
    job.unit_count = static_cast<int64_t>(units.size());
  }

  Plan(const Plan&) = delete;

  // The approximate number of operations in one unit.
  int64_t work() const { return 16 + 8 * job.vertices * job.channels / std::max<int64_t>(1, job.unit_count); }
};

Tensor vertex_sample(const Maps& features, const Tensor& vertices, const std::optional<Tensor>& camera,
                     int64_t height, int64_t width, bool align_corners, bool border) {
  const View view = check_arguments(features, vertices, camera, height, width, align_corners);
  const Isa isa = active_isa();
  const int64_t batch = vertices.size(0);
  Plan plan(features, view, border, true);
  SampleJob& job = plan.job;
  Tensor output = new_empty<3>(features[0], {batch, job.vertices, job.channels});
  dispatch_floating<c10::BFloat16>(features[0].scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
    const std::vector<T> points = project<T>(view, true);
    if (output.numel() == 0) return;
    prefer_huge_pages(output);
    job.points = points.data();
    job.output = output.mutable_data_ptr();
    parallel_for(batch * job.unit_count, plan.work(), [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(plan.scratch);
      PAHM_ISA_CALL_AS(isa, sample_units<S>, job, begin, end, scratch.get());
    });
  });
  return output;
}

// The memory format of a map's gradient: the map's own, or the nearest one.
bool wants_channels_last(const Tensor& map) { return !map.is_contiguous() && map.stride(1) == 1; }

// Sums the units' shares of the point gradients and propagates them back through the projection.
template <typename T>
void backward_projection(const View& view, const SampleJob& job, const std::vector<T>& points,
                         T* vertex_grads, T* camera_grads) {
  const int64_t count = job.vertices, width = view.vertices.size(2), camera_size = view.perspective() ? 9 : 3;
  const T* vertices = view.vertices.const_data_ptr<T>();
  const T* shares = static_cast<const T*>(job.point_grads);
  parallel_for(view.vertices.size(0), count * (job.unit_count + 16), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Projection<T> projection(view, b);
      double camera_grad[9] = {};
      for (int64_t n = 0; n < count; ++n) {
        T g[2] = {0, 0};
        for (int64_t unit = 0; unit < job.unit_count; ++unit) {
          const T* share = shares + ((b * job.unit_count + unit) * count + n) * 2;
          g[0] += share[0];
          g[1] += share[1];
        }
        const int64_t i = b * count + n;
        projection.backward(vertices + i * width, points.data() + i * 2, g, vertex_grads + i * width,
                            camera_grad);
      }
      if (camera_grads != nullptr)
        std::copy(camera_grad, camera_grad + camera_size, camera_grads + b * camera_size);
    }
  });
}

// Gradients of the maps, the vertices and the camera. `needs` has a flag for each map, then one for the
// vertices and one for the camera. An unneeded gradient is an empty tensor.
std::tuple<Maps, Tensor, Tensor> vertex_sample_backward(const Tensor& grad, const Maps& features,
                                                        const Tensor& vertices,
                                                        const std::optional<Tensor>& camera, int64_t height,
                                                        int64_t width, bool align_corners, bool border,
                                                        const std::vector<bool>& needs) {
  const View view = check_arguments(features, vertices, camera, height, width, align_corners);
  const Isa isa = active_isa();
  const int64_t batch = vertices.size(0);
  Plan plan(features, view, border, false);
  SampleJob& job = plan.job;
  check(grad.dim() == 3 && grad.size(0) == batch && grad.size(1) == job.vertices &&
            grad.size(2) == job.channels,
        "grad must have the output's shape");
  check_cpu(grad, "grad");
  check_same_type(features[0], grad, "grad");
  check(needs.size() == features.size() + 2, "needs must have an entry a map and two more");
  const bool needs_camera = camera && needs[features.size() + 1];
  const bool needs_points = needs[features.size()] || needs_camera;
  const Tensor output_grad = as_contiguous(grad);
  job.output_grad = output_grad.const_data_ptr();

  Maps map_grads;
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& map = features[i];
    if (!needs[i]) {
      map_grads.push_back(new_empty<1>(map, {0}));
      continue;
    }
    map_grads.push_back(
        torch::stable::empty(map.sizes(), map.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                             wants_channels_last(map) ? torch::headeronly::MemoryFormat::ChannelsLast
                                                      : torch::headeronly::MemoryFormat::Contiguous));
    prefer_huge_pages(map_grads.back());
    plan.maps[i].grad = map_grads.back().mutable_data_ptr();
  }
  const auto like = [&](const Tensor& t, bool needed) {
    return needed ? torch::stable::new_empty(t, t.sizes()) : new_empty<1>(t, {0});
  };
  Tensor vertex_grad = like(view.vertices, needs_points);
  Tensor camera_grad = needs_camera ? like(*view.camera, true) : like(view.vertices, false);
  dispatch_floating<c10::BFloat16>(features[0].scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
    const std::vector<T> points = project<T>(view, false);
    job.points = points.data();
    std::unique_ptr<T[]> shares;
    if (needs_points) {
      shares =
          std::make_unique_for_overwrite<T[]>(static_cast<size_t>(batch * job.unit_count * job.vertices * 2));
      job.point_grads = shares.get();
    }
    parallel_for(batch * job.unit_count, plan.work(), [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(plan.scratch);
      PAHM_ISA_CALL_AS(isa, backward_units<S>, job, begin, end, scratch.get());
    });
    if (needs_points) {
      backward_projection(view, job, points, vertex_grad.mutable_data_ptr<T>(),
                          needs_camera ? camera_grad.mutable_data_ptr<T>() : nullptr);
    }
  });
  return {map_grads, of_type(vertex_grad, vertices.scalar_type()),
          of_type(camera_grad, vertices.scalar_type())};
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CPU, m) {
  m.impl("vertex_sample", TORCH_BOX(&pahm::vertex_sample));
  m.impl("_vertex_sample_backward", TORCH_BOX(&pahm::vertex_sample_backward));
}
