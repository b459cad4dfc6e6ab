"""The distillation as released: plain norms, clipped weights, fixed scales, BatchNorm statistics per device.

    python train.py configs/distill_release.py data.path=train.jsonl

Hardware and time: as distill.py; the release's form of W_C costs a second pull through the up half.
"""

import dataclasses

from configs.distill import get_config as distill
from moebius_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    config = distill()
    return config.replace(loss=dataclasses.replace(config.loss, balance="release"), batch_norm="device")
