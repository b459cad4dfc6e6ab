"""Table 2, experiment 15: see table2.py."""

from configs.table2 import experiment
from moebius_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    return experiment(15)
