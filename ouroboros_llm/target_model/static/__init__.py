"""Passes of fixed shape: attention of our own, CUDA graph capture, acceptance on the device.

They run a copy of the model's modules that shares its weights, so the model itself stays as it is.
"""
