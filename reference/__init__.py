"""Reference implementations: plain float64 PyTorch, one module a family, the same names as in `kernels/`.

The docstring of each function is the op's contract; the kernel and every adapter take the same arguments.
"""
