"""Triton kernels of the attention function: forward, gradient of the queries, gradient of the keys and values."""
