"""Triton kernels, each the fast twin of a formula in `megatron.ops`; the only package that imports triton."""
