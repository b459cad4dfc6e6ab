"""One experiment of the paper's Table 2, which block is worth what: 18k steps with and without distillation.

    python train.py configs/table2_exp09.py data.path=train.jsonl       # experiments 1 to 15

Hardware and time: as distill.py, for 18k of its 138k steps (the learning rate stays at its peak).
"""

from configs.table5 import row
from moebius_jax.distillation.balance import LossConfig
from moebius_jax.models import UNetConfig
from moebius_jax.training.config import TrainConfig

WITHOUT_DISTILLATION = (1, 2, 3, 4, 5, 6, 10)


def experiment(number: int) -> TrainConfig:
    """Experiment `number`: its architecture, and its column KD."""
    config = row(4).replace(student=UNetConfig.ablation(number, remat=True))
    return config.replace(loss=LossConfig(terms=("task",))) if number in WITHOUT_DISTILLATION else config


def get_config() -> TrainConfig:
    """The published student."""
    return experiment(9)
