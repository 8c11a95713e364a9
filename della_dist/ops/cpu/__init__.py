"""The kernels as machine code (Numba): every core of the machine that merges."""
