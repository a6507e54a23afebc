"""Triton kernels of the draft's step on CUDA; imported only where a GPU runs them."""
