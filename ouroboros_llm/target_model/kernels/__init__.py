"""Triton kernels: attention over a draft tree, fused operations, products with quantized weights.

Without a device they run under Triton's interpreter, in tests.
"""
