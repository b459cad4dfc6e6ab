"""One row of the paper's Table 5, which losses are worth what: the 18k-step checkpoints of distill.py.

    python train.py configs/table5_row1.py data.path=train.jsonl       # rows 1 to 4

Row 1 trains on the coarse loss alone, which never reaches the up half: weight decay is all that moves it.
Hardware and time: as distill.py, for 18k of its 138k steps (the learning rate stays at its peak).
"""

from configs.distill import get_config as distill
from moebius_jax.distillation.balance import LossConfig, Term
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.optimizer import OptimizerConfig

ROWS: dict[int, tuple[Term, ...]] = {
    1: ("coarse",),
    2: ("coarse", "fine"),
    3: ("coarse", "fine", "task"),
    4: ("coarse", "fine", "task", "perceptual"),
}


def row(number: int) -> TrainConfig:
    """Row `number`, from the top."""
    return distill().replace(
        loss=LossConfig(terms=ROWS[number]), optimizer=OptimizerConfig(schedule="constant"), steps=18_000
    )


def get_config() -> TrainConfig:
    """The last row."""
    return row(4)
