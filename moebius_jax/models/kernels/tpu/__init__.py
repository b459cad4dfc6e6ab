"""Kernels for TPUs (Mosaic)."""
