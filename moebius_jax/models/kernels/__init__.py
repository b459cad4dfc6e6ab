"""Kernels (Pallas) for what XLA cannot fuse, each beside a plain form that is its reference."""
