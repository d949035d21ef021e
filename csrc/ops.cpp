// The whole op surface: one schema a line. Kernels register themselves in the file of their op.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(pahm_ops, m) {
  m.def("cpu_isa() -> int");
  m.def("cpu_fma(int rounds, bool bfloat16=False) -> int");
  m.def("vertex_sample(Tensor[] features, Tensor vertices, Tensor? camera, int height, int width, bool align_corners, bool border) -> Tensor");
  m.def("vertex_sample_backward(Tensor grad, Tensor[] features, Tensor vertices, Tensor? camera, int height, int width, bool align_corners, bool border, bool[] needs) -> (Tensor[], Tensor, Tensor)");
  m.def("spiral_conv(Tensor x, Tensor indices, Tensor weight, Tensor? bias, int activation=0) -> Tensor");
  m.def("spiral_conv_input_grad(Tensor grad, Tensor indices, Tensor weight, SymInt vertices) -> Tensor");
  m.def("spiral_conv_weight_grad(Tensor grad, Tensor x, Tensor indices) -> Tensor");
  m.def("mesh_pool(Tensor x, Tensor row_pointers, Tensor columns, Tensor values, Tensor t_row_pointers, Tensor t_columns, Tensor t_values) -> Tensor");

  // What the CUDA library has; the ops above call it (pahm_ops/_gpu.py).
  m.def("cuda_runs(int device) -> bool");
  m.def("vertex_sample_cuda(Tensor[] features, Tensor vertices, Tensor? camera, int height, int width, bool align_corners, bool border) -> Tensor");
  m.def("vertex_sample_backward_cuda(Tensor grad, Tensor[] features, Tensor vertices, Tensor? camera, int height, int width, bool align_corners, bool border, bool[] needs) -> (Tensor[], Tensor, Tensor)");
  m.def("spiral_conv_cuda(Tensor x, Tensor table, Tensor weight, Tensor? bias, int activation) -> Tensor");
  m.def("spiral_conv_input_grad_cuda(Tensor grad, Tensor t_pointers, Tensor t_rows, Tensor weight, int vertices) -> Tensor");
  m.def("spiral_conv_weight_grad_cuda(Tensor grad, Tensor x, Tensor table) -> Tensor");
  m.def("mesh_pool_cuda(Tensor x, Tensor row_pointers, Tensor columns, Tensor values) -> Tensor");
}
// clang-format on
