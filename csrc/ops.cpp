// All ops, one schema per line. Kernels register themselves in the file of their op. Only pahm_ops calls ops
// with a leading underscore. SpiralTable and MeshTransform in pahm_ops/prepared.py make the tables and the
// matrices; an op also takes what its derivatives need.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(pahm_ops, m) {
  m.def("_cpu_isa() -> int");
  m.def("_cuda_runs(int device) -> bool");
  m.def("_frozen_run(Tensor(a!)[] memory, Tensor program, int threads) -> ()");
  m.def("vertex_sample(Tensor[] features, Tensor vertices, Tensor? camera, int height, int width, bool align_corners, bool border) -> Tensor");
  m.def("_vertex_sample_backward(Tensor grad, Tensor[] features, Tensor vertices, Tensor? camera, int height, int width, bool align_corners, bool border, bool[] needs) -> (Tensor[], Tensor, Tensor)");
  m.def("spiral_conv(Tensor x, Tensor table, Tensor t_pointers, Tensor t_rows, Tensor weight, Tensor? bias, int activation) -> Tensor");
  m.def("_spiral_conv_input_grad(Tensor grad, Tensor table, Tensor t_pointers, Tensor t_rows, Tensor weight, SymInt vertices) -> Tensor");
  m.def("_spiral_conv_weight_grad(Tensor grad, Tensor x, Tensor table, Tensor t_pointers, Tensor t_rows) -> Tensor");
  m.def("mesh_pool(Tensor x, Tensor row_pointers, Tensor columns, Tensor values, Tensor t_row_pointers, Tensor t_columns, Tensor t_values) -> Tensor");
  m.def("_depthwise_conv(Tensor x, Tensor weight, int stride, int top, int left, int out_height, int out_width) -> Tensor");
  m.def("_depthwise_conv_input_grad(Tensor grad, Tensor weight, int stride, int top, int left, int height, int width) -> Tensor");
  m.def("_depthwise_conv_weight_grad(Tensor grad, Tensor x, int kernel_height, int kernel_width, int stride, int top, int left) -> Tensor");
  m.def("_batch_norm(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_variance, float momentum, float epsilon, float low, float high) -> (Tensor, Tensor)");
  m.def("_batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor statistics, float low, float high) -> (Tensor, Tensor, Tensor)");
}
// clang-format on
