"""Kernels in Triton, each beside a readable reference of the same signature."""
