"""Moebius inpainting in JAX: models, conversion, sampling, distillation, evaluation.

    from moebius_jax import MoebiusInpaintPipeline, load_unet

Submodules, from the bottom up: `models` (networks), `checkpoints` (our folder of weights), `conversion`
(released files and the Hub), `sampling` (solver and compiled core), `imaging` (pictures and masks),
`inpaint` (any size, batched), `pipeline` (the public entry); `distillation` (losses, adaptive weights,
gradients), `data` (samples and masks), `training` (what `train.py` is made of); `evaluation` (the paper's
benchmarks, metrics, reports, costs), `masks` (a tool); `cli`.
"""

from moebius_jax.checkpoints import load_elatentlpips, load_unet, load_vae, save_unet, save_vae
from moebius_jax.errors import UserError
from moebius_jax.models import UNet, UNetConfig, fold_batch_norm
from moebius_jax.pipeline import InpaintOutput, MoebiusInpaintPipeline

__version__ = "0.1.0"

__all__ = [
    "InpaintOutput",
    "MoebiusInpaintPipeline",
    "UNet",
    "UNetConfig",
    "UserError",
    "fold_batch_norm",
    "load_elatentlpips",
    "load_unet",
    "load_vae",
    "save_unet",
    "save_vae",
]
