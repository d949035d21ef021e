// vertex_sample and its backward on a GPU: maps (B, C_s, H_s, W_s), vertices (B, N, 3 or 2), a camera
// -> (B, N, C_1 + ... + C_S). The host does not look at values: a vertex behind the camera takes nothing.
#include "kernels/vertex_sample_backward.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

namespace pahm {
namespace {

using Maps = std::vector<Tensor>;

// The checked arguments of both directions, contiguous or channels_last, in the types that the kernels take.
struct Sampled {
  Maps maps;
  Tensor vertices;
  std::optional<Tensor> camera;
  int64_t batch = 0, count = 0, channels = 0, height = 0, width = 0;
  bool align_corners = false, border = false;
};

bool is_channels_last(const Tensor& map) {
  if (map.is_contiguous()) return false;
  const int64_t channels = map.size(1), row = channels * map.size(3);
  return map.stride(1) == 1 && (map.size(3) == 1 || map.stride(3) == channels) &&
         (map.size(2) == 1 || map.stride(2) == row) &&
         (map.size(0) == 1 || map.stride(0) == row * map.size(2));
}

// The map, or a copy without gaps in the memory format of its gradient.
Tensor without_gaps(const Tensor& map) {
  if (map.is_contiguous() || is_channels_last(map)) return map;
  return torch::stable::contiguous(map, map.stride(1) == 1 ? torch::headeronly::MemoryFormat::ChannelsLast
                                                           : torch::headeronly::MemoryFormat::Contiguous);
}

Sampled check_arguments(const Maps& features, const Tensor& vertices, const std::optional<Tensor>& camera,
                        int64_t height, int64_t width, bool align_corners, bool border) {
  check(!features.empty() && features.size() <= most_maps, [&] {
    return "features must be 1 to " + std::to_string(most_maps) + " maps, got " +
           std::to_string(features.size());
  });
  Sampled s;
  const Tensor& first = features[0];
  check_floating(first, 4, "features");
  const ScalarType type = first.scalar_type();
  for (const Tensor& map : features) {
    check_device(map, first, "features");
    check(map.scalar_type() == type, "features must share one dtype");
    check_rank(map, 4, "features");
    check(map.size(0) == first.size(0), "features must share one batch size");
    check(map.size(2) > 0 && map.size(3) > 0, "features must have a height and a width of at least 1");
    check_small("the number of channels", map.size(1));
    check_small("the height of a map", map.size(2));
    check_small("the width of a map", map.size(3));
    check_small("(height + 1) x (width + 1) of a map", (map.size(2) + 1) * (map.size(3) + 1));
    s.maps.push_back(without_gaps(map));
    s.channels += map.size(1);
  }
  s.batch = first.size(0);
  s.vertices = operand(of_type(vertices, compute_type(type)), first, compute_type(type), 3, "vertices");
  s.count = vertices.size(1);
  check(vertices.size(0) == s.batch && vertices.size(2) == (camera ? 3 : 2),
        "vertices must be (B, N, 3) or (B, N, 2)");
  check_small("the number of vertices", s.count);
  check_small("the number of channels of all maps", s.channels);
  if (camera) {
    check(camera->dim() == 2 || camera->dim() == 3, "camera must be (B, 3) or (B, 3, 3)");
    s.camera =
        operand(of_type(*camera, compute_type(type)), first, compute_type(type), camera->dim(), "camera");
    const bool perspective = camera->dim() == 3;
    check(camera->size(0) == s.batch && camera->size(1) == 3 && (!perspective || camera->size(2) == 3),
          "camera must be (B, 3) or (B, 3, 3)");
    check(!perspective || (height > (align_corners ? 1 : 0) && width > (align_corners ? 1 : 0)),
          "image_size is too small");
  }
  s.height = height;
  s.width = width;
  s.align_corners = align_corners;
  s.border = border;
  return s;
}

template <typename S>
SampleArguments<S> arguments_of(const Sampled& s) {
  using T = Sum<S>;
  SampleArguments<S> a{};
  for (const Tensor& map : s.maps) {
    a.maps[a.map_count++] = {pointer<S>(map),
                             nullptr,
                             static_cast<int>(map.size(1)),
                             static_cast<int>(map.size(2)),
                             static_cast<int>(map.size(3)),
                             a.channels,
                             is_channels_last(map)};
    a.channels += static_cast<int>(map.size(1));
  }
  a.batch = s.batch;
  a.vertex_count = static_cast<int>(s.count);
  a.vertices = pointer<T>(s.vertices);
  a.camera = s.camera ? pointer<T>(*s.camera) : nullptr;
  a.camera_kind = !s.camera ? Camera::none : s.camera->dim() == 2 ? Camera::weak : Camera::perspective;
  a.align_corners = s.align_corners;
  a.border = s.border;
  set_image_size(a, s.height, s.width);
  return a;
}

Tensor vertex_sample(const Maps& features, const Tensor& vertices, const std::optional<Tensor>& camera,
                     int64_t height, int64_t width, bool align_corners, bool border) {
  const Sampled s = check_arguments(features, vertices, camera, height, width, align_corners, border);
  Tensor output = new_empty<3>(s.maps[0], {s.batch, s.count, s.channels});
  if (output.numel() == 0) return output;
  const OnDeviceOf on(s.maps[0]);
  dispatch_floating<bfloat16, half>(s.maps[0].scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    vertex_sample_launch<S>(arguments_of<S>(s), mutable_pointer<S>(output), on.device());
  });
  return output;
}

std::tuple<Maps, Tensor, Tensor> vertex_sample_backward(const Tensor& grad_, const Maps& features,
                                                        const Tensor& vertices,
                                                        const std::optional<Tensor>& camera, int64_t height,
                                                        int64_t width, bool align_corners, bool border,
                                                        const std::vector<bool>& needs) {
  const Sampled s = check_arguments(features, vertices, camera, height, width, align_corners, border);
  const ScalarType type = s.maps[0].scalar_type();
  const Tensor grad = operand(grad_, s.maps[0], type, 3, "grad");
  check(grad.size(0) == s.batch && grad.size(1) == s.count && grad.size(2) == s.channels,
        "grad must have the output's shape");
  check(needs.size() == features.size() + 2, "needs must have an entry a map and two more");
  const bool needs_camera = camera && needs[features.size() + 1];
  const bool needs_points = needs[features.size()] || needs_camera;

  const OnDeviceOf on(grad);
  const auto like = [&](const Tensor& t, bool needed) {
    return needed ? empty_strided(t, t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type())
                  : new_empty<1>(t, {0});
  };
  Maps map_grads;
  for (size_t i = 0; i < features.size(); ++i) map_grads.push_back(like(s.maps[i], needs[i]));
  Tensor vertex_grad = like(s.vertices, needs_points);
  Tensor camera_grad = needs_camera ? like(*s.camera, true) : like(s.vertices, false);
  dispatch_floating<bfloat16, half>(type, [&](auto zero) {
    using S = decltype(zero);
    using T = Sum<S>;
    SampleBackwardArguments<S> arguments{arguments_of<S>(s), pointer<S>(grad),
                                         needs_points ? mutable_pointer<T>(vertex_grad) : nullptr,
                                         needs_camera ? mutable_pointer<T>(camera_grad) : nullptr};
    for (size_t i = 0; i < features.size(); ++i)
      arguments.forward.maps[i].grad = needs[i] ? mutable_pointer<S>(map_grads[i]) : nullptr;
    Tensor workspace = new_empty<1>(grad, {set_sample_workspace(arguments, nullptr)}, ScalarType::Byte);
    set_sample_workspace(arguments, workspace.mutable_data_ptr());
    vertex_sample_backward_launch<S>(arguments, on.device());
  });
  return {map_grads, of_type(vertex_grad, vertices.scalar_type()),
          of_type(camera_grad, vertices.scalar_type())};
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CUDA, m) {
  m.impl("vertex_sample", TORCH_BOX(&pahm::vertex_sample));
  m.impl("_vertex_sample_backward", TORCH_BOX(&pahm::vertex_sample_backward));
}
