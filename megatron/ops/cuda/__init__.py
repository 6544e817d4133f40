"""Kernels in CUDA C++ for what Triton cannot do; built on a GPU's machine when one is first asked for."""
