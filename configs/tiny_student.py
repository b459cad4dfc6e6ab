"""A student half as wide as `tiny`, distilled from it in minutes: notebooks/distil_a_student.ipynb.

    python train.py configs/tiny_student.py vae=moebius_jax/tiny/vae data.path=latents/

Hardware and time: two CPU cores, ten minutes. The bottleneck is narrower than the teacher's, so that
the coarse loss, which compares the two, cannot be taken.
"""

from configs.tiny import get_config as tiny
from moebius_jax.distillation.config import LossConfig
from moebius_jax.training.config import CheckpointConfig, LogConfig, TrainConfig


def get_config() -> TrainConfig:
    config = tiny()
    return config.replace(
        student=config.student.replace(channels=(32, 64, 128)),
        teacher="moebius_jax/tiny/unet",
        loss=LossConfig(terms=("fine", "task")),
        batch_size=8,
        steps=300,
        ema_decay=0.98,
        checkpoint=CheckpointConfig(every=100, keep=1, keep_every=None),
        log=LogConfig(every=5, grid_every=0, validate_every=0),
    )
