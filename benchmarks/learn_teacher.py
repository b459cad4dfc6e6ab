"""The teacher of `learn.py`: trained on the task loss alone."""

from benchmarks.learn_config import TEACHER
from benchmarks.learn_config import get_config as student_config
from moebius_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    return student_config().replace(student=TEACHER, steps=3000)
