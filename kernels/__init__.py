"""The mathematics on stacks: every op's reference, the root solvers, and kernels in Triton."""
