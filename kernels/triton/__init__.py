"""Kernels in Triton, and what plans and launches them; each is judged against its reference."""
