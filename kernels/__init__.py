"""Every op in plain PyTorch, and the Triton kernels that replace it on a GPU."""
