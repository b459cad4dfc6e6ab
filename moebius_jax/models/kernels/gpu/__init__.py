"""Kernels for NVIDIA GPUs (Triton)."""
