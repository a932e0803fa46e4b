"""The mathematics on stacks, in plain PyTorch: every op's reference and the root solvers."""
