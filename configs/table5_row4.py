"""Table 5, row 4: see table5.py."""

from configs.table5 import row
from moebius_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    return row(4)
