"""Each op in Triton, where no CUDA kernel was compiled: plain functions of tensors, without derivatives."""
