"""The three losses that compare noise or features: coarse, fine, task (paper, section 3.3)."""

from typing import ClassVar

from jaxtyping import Array

from moebius_jax.distillation.loss import Context, Loss, Scalar, mean_square
from moebius_jax.schema import checked


@checked
class Coarse(Loss):
    """L_C: the student's last down level against the teacher's first up level."""

    name: ClassVar[str] = "coarse"
    logged_as: ClassVar[str] = "loss_featkd"
    at: ClassVar[str] = "bottleneck"
    needs_teacher: ClassVar[bool] = True
    release_scale: ClassVar[float] = 0.01

    def __call__(self, prediction: Array, context: Context) -> Scalar:
        return mean_square(prediction, context.bottleneck)


@checked
class Fine(Loss):
    """L_F: the student's noise against the teacher's."""

    name: ClassVar[str] = "fine"
    logged_as: ClassVar[str] = "loss_outkd"
    needs_teacher: ClassVar[bool] = True
    release_scale: ClassVar[float] = 0.01

    def __call__(self, prediction: Array, context: Context) -> Scalar:
        return mean_square(prediction, context.teacher.sample)


@checked
class Task(Loss):
    """L_T: the student's noise against the noise that was added (or its velocity against the true one)."""

    name: ClassVar[str] = "task"
    logged_as: ClassVar[str] = "loss_task"
    release_scale: ClassVar[float] = 0.5

    def __call__(self, prediction: Array, context: Context) -> Scalar:
        return mean_square(prediction, context.noised.target)
