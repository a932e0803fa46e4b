"""The ops that have kernels in Triton."""
