"""Moebius inpainting in JAX: models, conversion, sampling, distillation, evaluation.

    from moebius_jax import MoebiusInpaintPipeline, load_unet

Packages, from the bottom up: `models` (networks), `weights` (tensors with names: folders, released files, the
Hub), `diffusion` (noise and solvers), `imaging` (pictures and masks), `inpaint` (images of any size, the
pipeline), `data` (training samples and masks), `distillation` (losses and their balance), `training` (what
`train.py` is made of), `evaluation` (the paper's benchmarks, metrics, reports), `cli` (the programs).
"""

import importlib
from typing import TYPE_CHECKING, Any

from moebius_jax.errors import UserError

if TYPE_CHECKING:
    from moebius_jax.evaluation.report.result import EvaluationReport
    from moebius_jax.evaluation.run import evaluate
    from moebius_jax.inpaint.pipeline import InpaintOutput, MoebiusInpaintPipeline
    from moebius_jax.models import UNet, UNetConfig, fold_batch_norm
    from moebius_jax.weights.load import load_elatentlpips, load_unet, load_vae, save_unet, save_vae

__version__ = "0.2.0.dev0"

__all__ = [
    "EvaluationReport",
    "InpaintOutput",
    "MoebiusInpaintPipeline",
    "UNet",
    "UNetConfig",
    "UserError",
    "evaluate",
    "fold_batch_norm",
    "load_elatentlpips",
    "load_unet",
    "load_vae",
    "save_unet",
    "save_vae",
]

_HOMES = {
    "moebius_jax.evaluation.report.result": ("EvaluationReport",),
    "moebius_jax.evaluation.run": ("evaluate",),
    "moebius_jax.inpaint.pipeline": ("InpaintOutput", "MoebiusInpaintPipeline"),
    "moebius_jax.models": ("UNet", "UNetConfig", "fold_batch_norm"),
    "moebius_jax.weights.load": ("load_elatentlpips", "load_unet", "load_vae", "save_unet", "save_vae"),
}


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is asked for: a program's help need not wait for jax."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
