"""Each op in plain PyTorch: what its kernels are held to, and what serves where none was compiled."""
