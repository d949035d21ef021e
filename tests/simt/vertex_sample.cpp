// vertex_sample's kernels on the CPU, for tests/simt/test_vertex_sample.py.
// sizes: batch, vertices, height and width of the image, align_corners, border; then for each map channels,
// height, width, channels_last.
#include "kernels/vertex_sample_backward.cuh"

#include "run.h"

namespace {

template <typename S>
pahm::SampleArguments<S> arguments_of(const void* const* maps, const void* vertices, const void* camera,
                                      int camera_kind, int map_count, const int64_t* sizes) {
  using T = pahm::Sum<S>;
  pahm::SampleArguments<S> a{};
  a.batch = sizes[0];
  a.vertex_count = static_cast<int>(sizes[1]);
  a.vertices = static_cast<const T*>(vertices);
  a.camera = static_cast<const T*>(camera);
  a.camera_kind = static_cast<pahm::Camera>(camera_kind);
  a.align_corners = sizes[4] != 0;
  a.border = sizes[5] != 0;
  pahm::set_image_size(a, sizes[2], sizes[3]);
  for (int i = 0; i < map_count; ++i) {
    const int64_t* size = sizes + 6 + 4 * i;
    a.maps[a.map_count++] = {static_cast<const S*>(maps[i]),
                             nullptr,
                             static_cast<int>(size[0]),
                             static_cast<int>(size[1]),
                             static_cast<int>(size[2]),
                             a.channels,
                             size[3] != 0};
    a.channels += static_cast<int>(size[0]);
  }
  return a;
}

// Where normalised coordinates lie on a map of 1 x `side` pixels, which need not be there.
template <typename S>
__global__ void locate_kernel(const pahm::SampleArguments<S> a, pahm::SampleMap<S> map, int32_t* out) {
  using T = pahm::Sum<S>;
  const int n = static_cast<int>(threadIdx.x);
  if (n >= a.vertex_count) return;
  T vertex[3];
  pahm::load_vertex(a, 0, n, vertex);
  pahm::Cell<T> cell{};
  const bool found = pahm::locate(a, map, pahm::project(a, 0, vertex), cell);
  pahm::store(out + 3 * n, static_cast<int32_t>(found));
  pahm::store(out + 3 * n + 1, static_cast<int32_t>(cell.x));
  pahm::store(out + 3 * n + 2, static_cast<int32_t>(cell.fx * 1000000));
}

}  // namespace

extern "C" const char* locate(int dtype, const void* vertices, int count, int side, bool align_corners,
                              bool border, int32_t* out, uint64_t seed, simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      const int64_t sizes[] = {1, count, 0, 0, align_corners, border};
      const auto arguments = arguments_of<S>(nullptr, vertices, nullptr, 0, 0, sizes);
      const pahm::SampleMap<S> map{nullptr, nullptr, 1, 1, side, 0, false};
      pahm::launch(locate_kernel<S>, 1, pahm::block_threads, 0, device(seed), arguments, map, out);
    });
  });
}
PAHM_CASE(locate);

extern "C" const char* vertex_sample(int dtype, const void* const* maps, const void* vertices,
                                     const void* camera, int camera_kind, void* out, int map_count,
                                     const int64_t* sizes, int processors, uint64_t seed,
                                     simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      const auto arguments = arguments_of<S>(maps, vertices, camera, camera_kind, map_count, sizes);
      pahm::vertex_sample_launch<S>(arguments, static_cast<S*>(out), device(seed, processors));
    });
  });
}
PAHM_CASE(vertex_sample);

// Without a camera. The spare lists may be null where one launch sorts everything.
extern "C" const char* sort_vertices(int dtype, const void* const* maps, const void* vertices, int32_t* cells,
                                     int32_t* order, void* positions, int32_t* spare_cells,
                                     int32_t* spare_order, int map_count, const int64_t* sizes, uint64_t seed,
                                     simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      using T = pahm::Sum<S>;
      const auto arguments = arguments_of<S>(maps, vertices, nullptr, 0, map_count, sizes);
      const pahm::SampleWorkspace<T> work{
          {cells, order}, {spare_cells, spare_order}, static_cast<pahm::Pack<T, 2>*>(positions), nullptr};
      pahm::sort_vertices_launch(arguments, work, device(seed));
    });
  });
}
PAHM_CASE(sort_vertices);

// Gradients that are null are not wanted.
extern "C" const char* vertex_sample_backward(int dtype, const void* grad, const void* const* maps,
                                              const void* vertices, const void* camera, int camera_kind,
                                              void* const* map_grads, void* vertex_grad, void* camera_grad,
                                              void* workspace, int64_t workspace_bytes, int map_count,
                                              const int64_t* sizes, int processors, uint64_t seed,
                                              simt::Counts* counts) {
  return run(counts, [&] {
    for_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      using T = pahm::Sum<S>;
      pahm::SampleBackwardArguments<S> arguments{
          arguments_of<S>(maps, vertices, camera, camera_kind, map_count, sizes),
          static_cast<const S*>(grad),
          static_cast<T*>(vertex_grad),
          static_cast<T*>(camera_grad),
          {}};
      for (int i = 0; i < map_count; ++i) arguments.forward.maps[i].grad = static_cast<S*>(map_grads[i]);
      if (pahm::set_sample_workspace(arguments, nullptr) > workspace_bytes)
        throw simt::Failure("too little workspace");
      pahm::set_sample_workspace(arguments, workspace);
      pahm::vertex_sample_backward_launch<S>(arguments, device(seed, processors));
    });
  });
}
PAHM_CASE(vertex_sample_backward);
