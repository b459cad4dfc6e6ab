"""Released PyTorch files to and from our folders."""

from moebius_jax.conversion.convert import convert_file, export_file, verify_folder

__all__ = ["convert_file", "export_file", "verify_folder"]
