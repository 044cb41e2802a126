"""Numerical kernels: pure functions on tensors. Knows no file and no format."""
