"""The distillation as the release's trainer and its configuration have it, where they differ from the paper.

    python train.py configs/distill_release.py data.path=train.jsonl

Balance from plain norms, clipped, with fixed scales; BatchNorm statistics and balance of each device's own
samples. On one device a batch of 768 needs accumulation=K, and each part is then balanced by itself.

Hardware and time: as distill.py; the release's form of W_C costs a second pull through the up half.
"""

import dataclasses

from configs.distill import get_config as distill
from moebius_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    config = distill()
    return config.replace(
        loss=dataclasses.replace(
            config.loss,
            balance="release",  # its trainer: ratios of norms, clipped; scales 0.01, 0.5, 0.01, 0.5
            balance_over="device",  # its data parallelism averages gradients that each device has balanced
            perceptual=dataclasses.replace(
                config.loss.perceptual,
                rescale_inputs=True,  # its trainer: normalize=True on latents that are scaled already
            ),
        ),
        optimizer=dataclasses.replace(
            config.optimizer,
            learning_rate=1e-4,  # its configuration; the paper: 2e-4
            schedule="constant",  # its configuration; the paper: a tenth at 111k and at 129k
        ),
        steps=200_000,  # its configuration; the paper: 138k
        ema_decay=0.0,  # its configuration keeps no average
        data=dataclasses.replace(
            config.data,
            augment=dataclasses.replace(
                config.data.augment,
                masks=("medium_512",),  # its configuration
                holes_on="image",  # its data set: a hole is finished before a square is cut
                foreground_masks="own",  # its data set: masks of the file's own foreground samples
            ),
        ),
        batch_norm="device",  # its data parallelism synchronises no statistics
        # batch_size stays the paper's 768: what it was for the released weights is not known to us.
    )
