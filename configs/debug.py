"""A few steps of a very small network on made-up data, to see the machinery work.

    python train.py configs/debug.py
    python train.py configs/debug.py data.kind=images data.path=photos/

Hardware: a laptop's CPU. Time: two minutes, most of it compiling. Expect no picture worth looking at.
"""

from moebius_jax.data.augment import AugmentConfig
from moebius_jax.data.config import DataConfig
from moebius_jax.data.loader import LoaderConfig
from moebius_jax.distillation.config import LossConfig
from moebius_jax.distillation.perceptual import Perceptual
from moebius_jax.models import ELatentLPIPSConfig, UNetConfig, VAEConfig
from moebius_jax.training.config import CheckpointConfig, LogConfig, TrainConfig
from moebius_jax.training.optimizer import OptimizerConfig

_SIZES = {"num_heads": 4, "latent_size": 8, "embedding_dim": 16, "context_dim": 16, "layers_per_block": 1}


def get_config() -> TrainConfig:
    """64 px samples, latents of 8 x 8, all losses with networks drawn at random."""
    return TrainConfig(
        student=UNetConfig.student(channels=(32, 64), transformers=(True, True), **_SIZES),
        teacher=UNetConfig.teacher(channels=(32, 64, 64), transformers=(True, True, False), **_SIZES),
        loss=LossConfig(
            perceptual=Perceptual(network=ELatentLPIPSConfig(groups=((8,), (8,), (8,), (8,), (8,))))
        ),
        vae=VAEConfig(channels=(32, 32, 32, 32), layers_per_block=1),
        data=DataConfig(
            kind="synthetic",
            augment=AugmentConfig(image_size=64, masks=("thick_256", "medium_256")),
            loader=LoaderConfig(threads=1, prefetch=2),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        batch_size=8,
        steps=20,
        dtype="float32",
        vae_dtype="float32",
        checkpoint=CheckpointConfig(every=10, keep=2, keep_every=None),
        log=LogConfig(every=1, grid_every=10, grid_images=4, grid_steps=4),
    )
