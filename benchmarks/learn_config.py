"""A distillation small enough for a CPU: 64 px samples, latents of 16 x 16, two levels. See `learn.py`."""

from moebius_jax.data.augment import AugmentConfig
from moebius_jax.data.config import DataConfig
from moebius_jax.data.loader import LoaderConfig
from moebius_jax.distillation.config import LossConfig
from moebius_jax.models import UNetConfig
from moebius_jax.training.config import CheckpointConfig, LogConfig, TrainConfig
from moebius_jax.training.optimizer import OptimizerConfig

SIZE = 64  # pixels a side
VAE = "moebius_jax/tiny/vae"
SIZES = {"num_heads": 4, "latent_size": 16, "embedding_dim": 32, "context_dim": 32}
STUDENT = UNetConfig.student(channels=(32, 64), transformers=(True, True), layers_per_block=1, **SIZES)
TEACHER = UNetConfig.teacher(
    channels=(32, 64, 64), transformers=(True, True, False), layers_per_block=2, **SIZES
)


def get_config() -> TrainConfig:
    return TrainConfig(
        student=STUDENT,
        vae=VAE,
        data=DataConfig(
            kind="latents",
            augment=AugmentConfig(image_size=SIZE, masks=("thick_256", "medium_256")),
            loader=LoaderConfig(threads=1, prefetch=2, max_bad_fraction=0.0),
        ),
        loss=LossConfig(terms=("task",)),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, schedule="cosine"),
        batch_size=16,
        steps=1500,
        ema_decay=0.995,
        dtype="float32",
        vae_dtype="float32",
        checkpoint=CheckpointConfig(every=500, keep=1, keep_every=None),
        log=LogConfig(every=100, grid_every=500, grid_images=6),
    )
