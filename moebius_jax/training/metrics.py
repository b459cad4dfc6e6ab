"""A step's figures under the names they are logged by."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from moebius_jax.distillation.gradients import Balanced
from moebius_jax.distillation.loss import Loss

Metrics = dict[str, Float[Array, ""]]


def balance_metrics(balanced: Balanced, losses: Sequence[Loss]) -> Metrics:
    """Losses, weights and norms: `loss`, `loss_task`, `weight_outkd`, `grad_norm_theta_f_task`, …"""
    names = {loss.name: loss.logged_as for loss in losses}
    short = {name: logged.removeprefix("loss_") for name, logged in names.items()}
    metrics = {names.get(name, "loss"): value for name, value in balanced.losses.items()}
    for name, value in balanced.weights.items():
        metrics[f"weight_{short.get(name, name)}"] = value
    for path, value in balanced.norms.items():
        where, name = path.split("/")
        metrics[f"grad_norm_{where}_{short.get(name, name)}"] = value
    return metrics


def first_bad_metric(metrics: Metrics) -> str | None:
    """Name of the first loss that is not finite, the total last; or of the gradients' or parameters' norm.

    A step's losses are those before its update; the parameters' norm tells of what it made of them.

    Of metrics on the host: asking the devices would wait for the step they have begun since.
    """
    losses = [name for name in metrics if name.startswith("loss_")]
    for name in (*losses, "loss", "gradient_norm", "parameter_norm"):
        if name in metrics and not np.isfinite(metrics[name]):
            return name
    return None
