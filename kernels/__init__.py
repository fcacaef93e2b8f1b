"""Triton kernels, one module a family. The contract of each is the docstring of its namesake in `reference/`."""
