"""One experiment of the paper's Table 2, which block is worth what: 18k steps with and without distillation.

    python train.py configs/table2.py:9 data.path=train.jsonl       # experiments 1 to 15
    python train.py configs/table2.py:teacher data.path=train.jsonl # PixelHacker, the table's first line

Hardware and time: as distill.py, for 18k of its 138k steps (the learning rate stays at its peak).
"""

from configs.table5 import get_config as table5
from moebius_jax.distillation.config import LossConfig
from moebius_jax.models import UNetConfig
from moebius_jax.models.table2 import experiment
from moebius_jax.training.config import TrainConfig


def get_config(row: str = "9") -> TrainConfig:
    """Experiment `row`: its architecture, and its column KD; or the teacher, on the task loss."""
    if row == "teacher":
        return table5().replace(student=UNetConfig.teacher(remat=True), loss=LossConfig(terms=("task",)))
    if not row.isdecimal():
        raise ValueError(f"row is {row!r}; expected a number or teacher, as in configs/table2.py:9")
    config = table5().replace(student=UNetConfig.ablation(int(row), remat=True))
    return config if experiment(int(row)).is_distilled else config.replace(loss=LossConfig(terms=("task",)))
