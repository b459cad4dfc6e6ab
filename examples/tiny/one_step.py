"""After `sharpen.py`, pure noise alone: `tiny` paints in one step, and this is the step.

    python train.py examples/tiny/one_step.py:WORK/vae --workdir WORK/one_step init=WORK/sharpened/model \\
        data.path=WORK/latents_train seed=9

The decoded picture counts three times as much as there. What comes of it is averaged with what it began with
(average.py). Needs the `train` and `eval` extras.
"""

import dataclasses

from examples.tiny.sharpen import Pixels
from examples.tiny.sharpen import get_config as sharpen
from moebius_jax.distillation.config import LossConfig
from moebius_jax.training.config import TrainConfig


def get_config(vae: str = "moebius_jax/tiny/vae") -> TrainConfig:
    """`vae` is the folder of the autoencoder the latents are of."""
    config = sharpen(vae)
    return config.replace(
        loss=LossConfig(terms=("task", Pixels(network=vae, scale=6.0)), balance="release"),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-4),
        timestep_sampling=(999,),
        steps=340,
    )
