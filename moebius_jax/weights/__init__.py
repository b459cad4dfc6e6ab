"""Tensors with names: our folders, released files, the way from one to the other, and the Hub."""

from moebius_jax.weights.convert import convert_file, export_file, verify_folder
from moebius_jax.weights.load import (
    load_elatentlpips,
    load_inception,
    load_network,
    load_unet,
    load_vae,
    save_network,
    save_unet,
    save_vae,
)

__all__ = [
    "convert_file",
    "export_file",
    "load_elatentlpips",
    "load_inception",
    "load_network",
    "load_unet",
    "load_vae",
    "save_network",
    "save_unet",
    "save_vae",
    "verify_folder",
]
