"""The smallest run with all four losses: one level, latents of 8 x 8."""

from configs.debug import get_config as debug
from moebius_jax.models import UNetConfig
from moebius_jax.training.config import CheckpointConfig, LogConfig, TrainConfig
from moebius_jax.training.optimizer import OptimizerConfig

# 64 channels: with 32, each channel is a GroupNorm group of its own and what is added to it has no gradient.
SIZES = {"num_heads": 4, "latent_size": 8, "embedding_dim": 16, "context_dim": 16, "layers_per_block": 1}


def get_config() -> TrainConfig:
    return debug().replace(
        student=UNetConfig.student(channels=(64,), transformers=(True,), **SIZES),
        teacher=UNetConfig.teacher(channels=(64, 64), transformers=(True, False), **SIZES),
        # Some gradients are zero but for rounding (biases before BatchNorm); with Adam's own eps they would
        # move a parameter as far as any other, in a direction that rounding chooses.
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="constant", newton_schulz_dtype="float32", eps=1e-4
        ),
        checkpoint=CheckpointConfig(every=6, keep=3, keep_every=None),
        log=LogConfig(every=4, grid_every=0),
        steps=24,
    )
