"""Each op in Triton, for use without compiled CUDA kernels: plain functions of tensors, no derivatives."""
