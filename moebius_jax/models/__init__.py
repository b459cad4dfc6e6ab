"""Networks. They know nothing of files, images or devices."""

from moebius_jax.models.config import UNetConfig
from moebius_jax.models.elatentlpips import ELatentLPIPS, ELatentLPIPSConfig
from moebius_jax.models.fold import fold_batch_norm, inference_copy
from moebius_jax.models.inception import Inception, InceptionConfig
from moebius_jax.models.unet import UNet, UNetOutput
from moebius_jax.models.vae import VAE, VAEConfig

__all__ = [
    "VAE",
    "ELatentLPIPS",
    "ELatentLPIPSConfig",
    "Inception",
    "InceptionConfig",
    "UNet",
    "UNetConfig",
    "UNetOutput",
    "VAEConfig",
    "fold_batch_norm",
    "inference_copy",
]
