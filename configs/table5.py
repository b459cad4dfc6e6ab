"""One row of the paper's Table 5, which losses are worth what: the 18k-step checkpoints of distill.py.

    python train.py configs/table5.py:1 data.path=train.jsonl       # rows 1 to 4, from the top

Row 1 trains on the coarse loss alone, which never reaches the up half: weight decay is all that moves it.
Hardware and time: as distill.py, for 18k of its 138k steps (the learning rate stays at its peak).
"""

import dataclasses

from configs.distill import get_config as distill
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.optimizer import OptimizerConfig

ROWS = {
    "1": ("coarse",),
    "2": ("coarse", "fine"),
    "3": ("coarse", "fine", "task"),
    "4": ("coarse", "fine", "task", "perceptual"),
}


def get_config(row: str = "4") -> TrainConfig:
    """Row `row` of the table."""
    if row not in ROWS:
        raise ValueError(f"row is {row!r}; Table 5 has rows 1 to {len(ROWS)}")
    config = distill()
    return config.replace(
        loss=dataclasses.replace(config.loss, terms=ROWS[row]),
        optimizer=OptimizerConfig(schedule="constant"),
        steps=18_000,
    )
