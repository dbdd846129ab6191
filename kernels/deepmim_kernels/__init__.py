"""Triton kernels for masked image modelling."""
